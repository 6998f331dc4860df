"""A model of several encoders side by side is not one that reads a text: commands say so in one line."""

import pytest
import torch
import transformers


@pytest.mark.filterwarnings("ignore")
def test_towers_are_refused_with_what_takes_them(lens_command, tmp_path):
    torch.manual_seed(0)
    text = {"vocab_size": 53, "hidden_size": 32, "intermediate_size": 20, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "eos_token_id": 52, "bos_token_id": 51, "pad_token_id": 0}
    picture = {"image_size": 8, "patch_size": 4, "hidden_size": 32, "intermediate_size": 20}
    picture |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(text_config=text, vision_config=picture)
    transformers.CLIPModel._from_config(config).save_pretrained(tmp_path / "clip")
    (tmp_path / "a.txt").write_text("a cat")
    answer = lens_command("run", "--model", tmp_path / "clip", "--text", tmp_path / "a.txt")
    assert answer.code == 2
    said = " ".join(answer.err.split())
    assert "CLIPModel has the towers text, vision" in said
