"""diffusers loads the embeddings that we write, and we read those of its examples."""

import pytest
import torch
from parity_models import make_pipeline

from lora_engine.formats import Embedding, read_embeddings, write_embeddings


@pytest.mark.parametrize("count", [1, 3])
def test_diffusers_loads_our_embeddings(count, tmp_path):
    vectors = torch.randn(count, 16, generator=torch.Generator().manual_seed(count))
    files = write_embeddings(tmp_path, [Embedding("<zorb>", {"text_encoder": vectors})], "diffusers")
    pipeline = make_pipeline()
    pipeline.load_textual_inversion(tmp_path, weight_name=files[0].name)
    tokens = ["<zorb>", *(f"<zorb>_{place}" for place in range(1, count))]
    ids = pipeline.tokenizer.convert_tokens_to_ids(tokens)
    weight = pipeline.text_encoder.get_input_embeddings().weight
    assert torch.equal(weight[ids], vectors)


def test_diffusers_takes_the_files_of_several_tokens_and_encoders_one_by_one(tmp_path):
    words = [
        Embedding(name, {"text_encoder": torch.full((2, 16), 1.0 + place)}) for place, name in enumerate(["<a>", "<b>"])
    ]
    pipeline = make_pipeline()
    pipeline.load_textual_inversion([str(file) for file in write_embeddings(tmp_path, words, "diffusers")])
    weight = pipeline.text_encoder.get_input_embeddings().weight
    for embedding in words:
        row = weight[pipeline.tokenizer.convert_tokens_to_ids(embedding.token)]
        assert torch.equal(row, embedding.vectors["text_encoder"][0])


def test_diffusers_refuses_two_encoders_in_one_file_and_takes_ours(tmp_path):
    embedding = Embedding("zorb", {"text_encoder": torch.ones(1, 16), "text_encoder_2": torch.ones(1, 16) * 2})
    kohya = write_embeddings(tmp_path / "kohya", [embedding], "kohya")[0]
    with pytest.raises(ValueError, match="single key"):
        make_pipeline().load_textual_inversion(str(kohya))
    one, two = write_embeddings(tmp_path / "ours", [embedding], "diffusers")
    for file, value in ((one, 1.0), (two, 2.0)):
        pipeline = make_pipeline()
        pipeline.load_textual_inversion(str(file))
        row = pipeline.tokenizer.convert_tokens_to_ids("zorb")
        assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[row], torch.full((16,), value))


def test_a_pickle_that_diffusers_examples_write_is_read(tmp_path):
    torch.save({"<zorb>": torch.ones(16)}, tmp_path / "learned_embeds.bin")
    assert read_embeddings(tmp_path / "learned_embeds.bin") == [
        Embedding("<zorb>", {"text_encoder": torch.ones(1, 16)})
    ]
