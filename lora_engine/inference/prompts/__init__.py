"""The prompt language of A1111 and its extensions: adapters, weights over steps and blocks, prompt editing. Torch-free.

`parse_prompt` reads a whole prompt. The order is A1111's: tags are taken out, `AND` splits, brackets with numbers edit
over the steps, then words are weighed.
"""
