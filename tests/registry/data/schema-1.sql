-- The registry's database as the first release made it (schema 1), with a few rows in every table.
PRAGMA foreign_keys=OFF;
PRAGMA journal_mode=WAL;
BEGIN;
CREATE TABLE meta (
  "key" VARCHAR NOT NULL,
  value VARCHAR NOT NULL,
  PRIMARY KEY ("key")
);
CREATE TABLE artifacts (
  sha256 VARCHAR NOT NULL,
  kind VARCHAR NOT NULL,
  size INTEGER NOT NULL,
  PRIMARY KEY (sha256)
);
CREATE TABLE runs (
  id VARCHAR NOT NULL,
  name VARCHAR NOT NULL,
  spec JSON NOT NULL,
  status VARCHAR NOT NULL,
  pid INTEGER NOT NULL,
  host VARCHAR NOT NULL,
  process VARCHAR NOT NULL,
  started_at VARCHAR(32) NOT NULL,
  ended_at VARCHAR(32),
  mlflow_run_id VARCHAR,
  PRIMARY KEY (id)
);
CREATE INDEX ix_runs_status ON runs (status);
CREATE TABLE names (
  name VARCHAR NOT NULL,
  created_at VARCHAR(32) NOT NULL,
  PRIMARY KEY (name)
);
CREATE TABLE contents (
  artifact VARCHAR NOT NULL,
  path VARCHAR NOT NULL,
  sha256 VARCHAR NOT NULL,
  size INTEGER NOT NULL,
  PRIMARY KEY (artifact, path),
  FOREIGN KEY(artifact) REFERENCES artifacts (sha256)
);
CREATE INDEX ix_contents_sha256 ON contents (sha256);
CREATE TABLE subjects (
  artifact VARCHAR NOT NULL,
  subject VARCHAR NOT NULL,
  label VARCHAR NOT NULL,
  PRIMARY KEY (artifact, subject),
  FOREIGN KEY(artifact) REFERENCES artifacts (sha256)
);
CREATE INDEX ix_subjects_subject ON subjects (subject);
CREATE TABLE executions (
  id VARCHAR NOT NULL,
  run_id VARCHAR NOT NULL,
  step VARCHAR NOT NULL,
  uses VARCHAR NOT NULL,
  revision VARCHAR NOT NULL,
  "key" VARCHAR NOT NULL,
  settings JSON NOT NULL,
  output VARCHAR,
  status VARCHAR NOT NULL,
  environment JSON NOT NULL,
  seed INTEGER,
  started_at VARCHAR(32) NOT NULL,
  ended_at VARCHAR(32),
  error VARCHAR,
  PRIMARY KEY (id),
  FOREIGN KEY(run_id) REFERENCES runs (id),
  FOREIGN KEY(output) REFERENCES artifacts (sha256)
);
CREATE INDEX ix_executions_run_id ON executions (run_id);
CREATE INDEX ix_executions_output ON executions (output);
CREATE INDEX executions_by_key ON executions ("key", status, started_at);
CREATE TABLE versions (
  id INTEGER NOT NULL,
  name VARCHAR NOT NULL,
  version INTEGER NOT NULL,
  identity VARCHAR NOT NULL,
  sha256 VARCHAR NOT NULL,
  size INTEGER NOT NULL,
  artifact VARCHAR NOT NULL,
  adapter_path VARCHAR NOT NULL,
  report VARCHAR,
  record VARCHAR NOT NULL,
  created_at VARCHAR(32) NOT NULL,
  run_id VARCHAR,
  mlflow_run_id VARCHAR,
  mirrored BOOLEAN NOT NULL,
  card JSON NOT NULL,
  metrics JSON NOT NULL,
  gates JSON NOT NULL,
  passed BOOLEAN,
  params JSON NOT NULL,
  PRIMARY KEY (id),
  UNIQUE (name, version),
  UNIQUE (name, identity),
  FOREIGN KEY(name) REFERENCES names (name),
  FOREIGN KEY(artifact) REFERENCES artifacts (sha256),
  FOREIGN KEY(report) REFERENCES artifacts (sha256),
  FOREIGN KEY(record) REFERENCES artifacts (sha256),
  FOREIGN KEY(run_id) REFERENCES runs (id)
);
CREATE INDEX ix_versions_report ON versions (report);
CREATE INDEX ix_versions_sha256 ON versions (sha256);
CREATE INDEX ix_versions_mirrored ON versions (mirrored);
CREATE INDEX ix_versions_artifact ON versions (artifact);
CREATE TABLE events (
  seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
  name VARCHAR NOT NULL,
  alias VARCHAR NOT NULL,
  action VARCHAR NOT NULL,
  "before" INTEGER,
  "after" INTEGER,
  actor VARCHAR NOT NULL,
  reason VARCHAR NOT NULL,
  gates JSON NOT NULL,
  at VARCHAR(32) NOT NULL,
  FOREIGN KEY(name) REFERENCES names (name)
);
CREATE INDEX events_by_alias ON events (name, alias);
CREATE TRIGGER events_no_update BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'the log of events is append-only'); END;
CREATE TRIGGER events_no_delete BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'the log of events is append-only'); END;
CREATE TABLE execution_inputs (
  execution VARCHAR NOT NULL,
  role VARCHAR NOT NULL,
  artifact VARCHAR NOT NULL,
  position INTEGER NOT NULL,
  PRIMARY KEY (execution, role),
  FOREIGN KEY(execution) REFERENCES executions (id),
  FOREIGN KEY(artifact) REFERENCES artifacts (sha256)
);
CREATE INDEX ix_execution_inputs_artifact ON execution_inputs (artifact);
CREATE TABLE version_parents (
  child INTEGER NOT NULL,
  position INTEGER NOT NULL,
  parent INTEGER,
  text VARCHAR NOT NULL,
  PRIMARY KEY (child, position),
  FOREIGN KEY(child) REFERENCES versions (id),
  FOREIGN KEY(parent) REFERENCES versions (id)
);
CREATE INDEX ix_version_parents_text ON version_parents (text);
CREATE INDEX ix_version_parents_parent ON version_parents (parent);
CREATE TABLE aliases (
  name VARCHAR NOT NULL,
  alias VARCHAR NOT NULL,
  version INTEGER,
  seq INTEGER NOT NULL,
  mirrored_seq INTEGER NOT NULL,
  PRIMARY KEY (name, alias),
  FOREIGN KEY(name) REFERENCES names (name),
  FOREIGN KEY(seq) REFERENCES events (seq)
);
INSERT INTO meta VALUES ('schema', '1');
INSERT INTO artifacts VALUES
  ('1111111111111111111111111111111111111111111111111111111111111111', 'manifest', 10),
  ('2222222222222222222222222222222222222222222222222222222222222222', 'adapter', 3000000000),
  ('3333333333333333333333333333333333333333333333333333333333333333', 'record', 5);
INSERT INTO contents VALUES
  ('2222222222222222222222222222222222222222222222222222222222222222', 'adapter.safetensors',
   '4444444444444444444444444444444444444444444444444444444444444444', 3000000000);
INSERT INTO subjects VALUES
  ('1111111111111111111111111111111111111111111111111111111111111111',
   '5555555555555555555555555555555555555555555555555555555555555555', 'picture one.jpg');
INSERT INTO runs VALUES
  ('run1', 'stripes', '{"seed":7}', 'COMPLETED', 42, 'lab', 'boot/1', '2026-01-01T00:00:00.000000+00:00',
   '2026-01-01T00:01:00.000000+00:00', 'ml1');
INSERT INTO executions VALUES
  ('e1', 'run1', 'photos', 'ingest', '1', 'k1', '{}', '1111111111111111111111111111111111111111111111111111111111111111',
   'COMPLETED', '{"packages":{"torch":"2.13.0"}}', NULL, '2026-01-01T00:00:01.000000+00:00', NULL, NULL),
  ('e2', 'run1', 'adapter', 'train', '1', 'k2', '{"rank":8}',
   '2222222222222222222222222222222222222222222222222222222222222222', 'COMPLETED', '{}', 1099511627776,
   '2026-01-01T00:00:02.000000+00:00', NULL, NULL),
  ('e3', 'run1', 'report', 'evaluate', '1', 'k3', '{}', NULL, 'FAILED', '{}', 7,
   '2026-01-01T00:00:03.000000+00:00', NULL, 'NaN');
INSERT INTO execution_inputs VALUES
  ('e2', 'dataset', '1111111111111111111111111111111111111111111111111111111111111111', 0);
INSERT INTO names VALUES ('zorb', '2026-01-01T00:00:04.000000+00:00');
INSERT INTO versions VALUES
  (1, 'zorb', 1, 'i1', '4444444444444444444444444444444444444444444444444444444444444444', 3000000000,
   '2222222222222222222222222222222222222222222222222222222222222222', 'adapter.safetensors', NULL,
   '3333333333333333333333333333333333333333333333333333333333333333', '2026-01-01T00:00:04.000000+00:00', 'run1', 'ml1', 1,
   '{"title":"Zorb"}', '{"clip_t":{"adapter":0.2}}', '[]', 1, '{"rank":8}');
INSERT INTO version_parents VALUES (1, 0, NULL, 'base:tiny');
INSERT INTO events VALUES
  (1, 'zorb', 'staging', 'stage', NULL, 1, 'ada@lab', 'registered', '[]', '2026-01-01T00:00:05.000000+00:00'),
  (2, 'zorb', 'production', 'promote', NULL, 1, 'ada@lab', 'looks right', '[{"metric":"clip_t"}]',
   '2026-01-01T00:00:06.000000+00:00');
INSERT INTO aliases VALUES ('zorb', 'staging', 1, 1, 1), ('zorb', 'production', 1, 2, 2);
COMMIT;
