"""Defines the look of the tabs Votes, Releases, Trainings and Datasets, in light and dark, on narrow screens too."""

REGISTRY_CSS = """
.studio-scroll { overflow-x: auto; }
.studio-scroll table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
.studio-scroll th { text-align: left; font-weight: 600; color: var(--studio-soft); white-space: nowrap; }
.studio-scroll th, .studio-scroll td { padding: .4rem .7rem .4rem 0; vertical-align: top;
  border-bottom: 1px solid var(--border-color-primary); overflow-wrap: break-word; }
.studio-scroll td { min-width: 3rem; max-width: 26rem; } .studio-scroll td b { white-space: nowrap; }
.studio-tag { display: inline-block; border: 1px solid currentColor; border-radius: 999px; padding: 0 .5rem;
  font-size: .8rem; white-space: nowrap; } .studio-bad { color: #b3261e; } .studio-good { color: #1a7f4b; }
.dark .studio-bad { color: #ff9a90; } .dark .studio-good { color: #7dd3a5; }
.votes-pair { display: grid; grid-template-columns: 1fr 1fr; gap: .75rem; max-width: 900px; margin: 0 auto; }
.votes-pair img { width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 10px; display: block;
  border: 2px solid transparent; background: var(--background-fill-secondary); image-rendering: pixelated; }
.votes-pair img.large { image-rendering: auto; }
.votes-pair button { all: unset; cursor: pointer; border-radius: 12px; min-width: 0; }
.votes-pair button:focus-visible img, .votes-pair button:hover img { border-color: var(--color-accent); }
.votes-prompt { max-width: 900px; margin: .25rem auto .5rem; overflow-wrap: anywhere; }
.votes-keys { display: grid; grid-template-columns: repeat(4, 1fr); gap: .5rem; max-width: 900px; margin: .75rem auto; }
.votes-keys button { min-height: 44px; border-radius: 8px; border: 1px solid var(--border-color-primary);
  background: var(--button-secondary-background-fill); color: var(--button-secondary-text-color); cursor: pointer; }
.votes-keys button:hover { border-color: var(--color-accent); }
.votes-keys kbd, .votes-back kbd { opacity: .65; font-size: .8em; }
.votes-back { max-width: 900px; margin: 0 auto; display: flex; justify-content: space-between; gap: 1rem;
  color: var(--studio-soft); font-size: .9rem; align-items: center; }
.votes-back button { background: none; border: none; color: inherit; text-decoration: underline; cursor: pointer;
  min-height: 32px; padding: 0; }
.votes-progress { max-width: 900px; margin: 0 auto; } .votes-progress progress { width: 100%; height: 8px;
  accent-color: var(--color-accent); }
@media (max-width: 560px) { .votes-keys { grid-template-columns: 1fr 1fr; } .votes-keys kbd { display: none; } }
.train-head { display: flex; flex-wrap: wrap; gap: .35rem 1rem; align-items: baseline; margin: .25rem 0; }
.train-head h3 { margin: 0; overflow-wrap: anywhere; }
.train-bar { width: 100%; height: 8px; accent-color: var(--color-accent); }
.train-facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: .5rem;
  margin: .6rem 0; }
.train-facts div { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .4rem .6rem; }
.train-facts dt { font-size: .78rem; color: var(--studio-soft); }
.train-facts dd { margin: 0; font-variant-numeric: tabular-nums; font-weight: 600; }
.train-curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: .75rem; }
.train-curves figure { margin: 0; border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .5rem; }
.train-curves figcaption { font-size: .85rem; font-weight: 600; }
.train-curves svg { width: 100%; height: auto; display: block; }
.train-curves text { font-size: 12px; fill: var(--studio-soft); }
.train-curves .grid { stroke: var(--border-color-primary); }
.train-curves .tick, .train-curves .axis { stroke: currentColor; opacity: .4; }
.train-curves polyline { fill: none; } .train-curves .raw { stroke: var(--color-accent); opacity: .3; }
.train-curves .mean { stroke: var(--color-accent); stroke-width: 2; }
.train-curves polyline.held { stroke: #c2620b; stroke-width: 1.5; } .train-curves circle.held { fill: #c2620b; }
.train-samples { overflow-x: auto; margin-top: .75rem; }
.train-samples table { border-collapse: separate; border-spacing: 6px; }
.train-samples th { font-weight: 500; font-size: .8rem; color: var(--studio-soft); text-align: left;
  max-width: 12rem; }
.train-samples img { width: 96px; height: 96px; object-fit: contain; image-rendering: pixelated; border-radius: 6px;
  display: block; background: var(--background-fill-secondary); }
.data-sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: .6rem; }
.data-sheet button { all: unset; box-sizing: border-box; display: grid; align-content: start;
  cursor: pointer; padding: .5rem;
  border: 1px solid var(--border-color-primary); border-radius: 10px; background: var(--background-fill-secondary);
  overflow-wrap: anywhere; }
.data-sheet button:hover, .data-sheet button:focus-visible, .data-sheet button[aria-pressed=true] {
  outline: 2px solid var(--color-accent); }
.data-sheet img { width: 100%; height: 130px; object-fit: contain; display: block; border-radius: 6px; }
.data-sheet img.pixel { image-rendering: pixelated; }
.data-sheet b { display: block; font-size: .78rem; font-weight: 500; margin-top: .3rem;
  color: var(--studio-soft); }
.data-sheet .caption { font-size: .88rem; } .data-sheet i { font-size: .75rem; }
.studio-refresh { align-self: end; margin-bottom: 2px; }
.train-legend { color: var(--studio-soft); font-weight: 400; }
"""
