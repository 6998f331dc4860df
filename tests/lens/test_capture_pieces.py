"""`lens.capture(chunk=)`: a prompt in pieces gives the trace of the whole; what cannot go in pieces is refused."""

import pytest
import torch
import transformers

import lens
from lens.common.errors import LensError
from lens.passes import pieces
from lens.passes.calls import LayerCall
from lens.passes.interface import switched
from lens.passes.pieces import check_looks_back
from lens.passes.structures import MaskStructure
from lens.traces import pieces as recorded
from tests.lens import naive
from tests.lens.architectures import build
from tests.lens.hybrids import hybrid

LENGTH = 77
ROPE = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "factor": 4.0,
    },
}


def _ids(length: int = LENGTH, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 60, (length,), generator=generator).tolist()


def _same(trace, other, limit: float = 3e-6) -> None:
    """Every variable; the same ones are there."""
    assert [*trace.dataset.data_vars] == [*other.dataset.data_vars]
    ratios = {
        str(name): naive.rms_ratio(trace.dataset[name].values, other.dataset[name].values)
        for name in other.dataset.data_vars
    }
    assert {name: ratio for name, ratio in ratios.items() if not ratio <= limit} == {}


# Learned positions, GQA, windows of two kinds with caches that drop keys, softcaps, learned sinks and a mask
# with no compact form: none of the windows (5 to 24) ends where a block does.
@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt_oss", "llama4"]
)
def test_pieces_give_the_trace_of_the_whole(name):
    model = lens.load(build(name))
    whole = lens.capture(model, _ids(), block_size=8, keep_qk=True)
    for chunk in (16, 24):
        apart = lens.capture(model, _ids(), block_size=8, keep_qk=True, chunk=chunk)
        _same(apart, whole)
        assert apart.attrs["chunk"] == chunk
        assert apart.attrs["windows"] == whole.attrs["windows"]
    assert whole.attrs["chunk"] is None


def test_pieces_give_the_naive_statistics():
    model = lens.load(build("mistral"))
    trace = lens.capture(model, _ids(), block_size=8, chunk=8)
    with torch.no_grad(), switched(model.model, "eager"):
        weights = model.model(torch.tensor([_ids()]), output_attentions=True).attentions
    for layer, matrix in enumerate(weights):
        expected = naive.statistics(matrix[0], _ids(), 8, causal=True)
        for name, values in expected.items():
            found = trace.dataset[name].sel(layer=layer).values
            assert naive.rms_ratio(found, values) < 1e-5, (layer, name)


@pytest.mark.parametrize("kind", ["qwen3_next", "diffllama"])
def test_layers_that_carry_a_state_or_attend_twice(kind):
    model = lens.load(hybrid(kind))
    whole = lens.capture(model, _ids(), block_size=8)
    _same(lens.capture(model, _ids(), block_size=8, chunk=16), whole, 1e-5)


@pytest.mark.parametrize("kind", ["bloom", "falcon_alibi"])
def test_a_bias_by_position(kind):
    config = {
        "bloom": lambda: transformers.BloomConfig(
            hidden_size=48, n_layer=2, n_head=6, vocab_size=97
        ),
        "falcon_alibi": lambda: transformers.FalconConfig(
            hidden_size=48,
            num_attention_heads=6,
            num_hidden_layers=2,
            vocab_size=97,
            alibi=True,
            multi_query=False,
        ),
    }[kind]()
    torch.manual_seed(0)
    model = lens.load(transformers.AutoModel.from_config(config).eval())
    for ids in (
        _ids(),
        _ids(33),
    ):  # the last piece of 33 tokens is one query, from which nothing is hidden
        _same(
            lens.capture(model, ids, block_size=8, chunk=16),
            lens.capture(model, ids, block_size=8),
        )


def test_several_prompts_short_ones_whole_and_into_folders(tmp_path):
    model = lens.load("text-lm-3l")
    prompts = [_ids(40), _ids(10)]
    whole = lens.capture(model, prompts, block_size=8)
    apart = lens.capture(model, prompts, block_size=8, chunk=16, out=tmp_path)
    for one, other in zip(apart, whole, strict=True):
        _same(one, other)
    assert [trace.attrs["chunk"] for trace in apart] == [16, None]
    assert (tmp_path / "p000" / "trace.json").exists()
    assert apart[0].tokens == whole[0].tokens


def test_labels_of_the_user():
    model = lens.load(build("mistral"))  # a window whose cache drops keys
    labels = {"thirds": ([index % 3 for index in range(LENGTH)], [1] * LENGTH)}
    whole = lens.capture(model, _ids(), block_size=8, labels=labels, statistics=["match_mass"])
    assert float(whole.match_mass.sel(match="thirds").sum()) > 1
    _same(
        lens.capture(
            model, _ids(), block_size=8, labels=labels, statistics=["match_mass"], chunk=16
        ),
        whole,
    )


def test_the_model_runs_one_piece_at_a_time():
    model = lens.load(build("llama"))
    lengths = []
    handle = model.model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append((args or [kwargs["hidden_states"]])[0].shape[1]),
        with_kwargs=True,
    )
    try:
        lens.capture(model, _ids(), block_size=8, chunk=16)
    finally:
        handle.remove()
    assert lengths == [12, 12, 12, 36, 16, 16, 16, 16, 13]  # the check, in pieces and whole, first


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: build("bert"), "layer 0 of BertModel sees later tokens too"),
        (lambda: hybrid("jamba"), "JambaForCausalLM computes something else in pieces"),
        (lambda: hybrid("recurrent_gemma"), "keeps no keys for the next piece"),
        (lambda: build("t5_encoder"), r"cannot run a prompt in pieces .*leave chunk out"),
    ],
)
def test_models_that_cannot_go_in_pieces(model, expected):
    with pytest.raises(LensError, match=expected):
        lens.capture(lens.load(model()), _ids(), block_size=8, chunk=16)


@pytest.mark.parametrize("kind", [*ROPE])
def test_a_rotary_embedding_that_stretches(kind):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=48 if kind == "dynamic" else 128,
        rope_parameters=ROPE[kind],
    )
    model = lens.load(transformers.LlamaForCausalLM(config).eval())
    short = _ids(30)
    _same(
        lens.capture(model, short, block_size=8, chunk=16), lens.capture(model, short, block_size=8)
    )
    if kind == "dynamic":
        pieces.check_length_matters_not(model, 48, "chunk=")
        with pytest.raises(LensError, match=r"stretches its rotary embedding .* beyond 48 tokens"):
            pieces.check_length_matters_not(model, 49, "chunk=")
    else:
        with pytest.raises(LensError, match=r"stretches its rotary embedding .* beyond 32 tokens"):
            lens.capture(model, _ids(), block_size=8, chunk=16)


def test_arguments_that_do_not_fit():
    model = lens.load(build("llama"))
    for chunk, expected in (
        (20, "chunk must be a multiple of block_size.*use chunk=16"),
        (4, "use chunk=8"),
        (0, "chunk must be"),
        ("16", "chunk must be"),
    ):
        with pytest.raises(LensError, match=expected):
            lens.capture(model, _ids(), block_size=8, chunk=chunk)  # pyright: ignore
    holes = {
        "input_ids": torch.tensor([[5, 6, 7, 8]]),
        "attention_mask": torch.tensor([[1, 0, 1, 1]]),
    }
    with pytest.raises(LensError, match="takes prompts of token ids alone, got attention_mask"):
        lens.capture(model, holes, block_size=2, chunk=2)
    pixels = torch.randn(1, 1, 10, 10)
    with pytest.raises(LensError, match="takes prompts of token ids alone, got pixel_values"):
        lens.capture(lens.load(build("vit")), {"pixel_values": pixels}, block_size=8, chunk=8)


def test_pieces_that_are_written_lie_in_files_meanwhile(tmp_path, monkeypatch):
    model, seen = lens.load(build("gpt_oss")), []
    add = recorded.Pieces.add

    def watched(self, record):
        add(self, record)
        in_memory = [name for one in self._layers.values() for name in one.variables]
        seen.append((in_memory, len(list(tmp_path.glob("t/.pieces-*/*")))))

    monkeypatch.setattr(recorded.Pieces, "add", watched)
    options = {"block_size": 8, "keep_qk": True, "chunk": 24}
    trace = lens.capture(model, _ids(), out=tmp_path / "t", **options)
    assert len(seen) == 4 * 3  # pieces of layers
    assert [in_memory for in_memory, _ in seen] == [[]] * 12
    assert seen[-1][1] == 3 * len(trace.dataset.data_vars)
    assert not list((tmp_path / "t").glob(".*"))
    monkeypatch.undo()
    _same(trace, lens.capture(model, _ids(), **options), limit=0.0)


@pytest.mark.parametrize(
    ("mask", "sees"),
    [(MaskStructure(False), "later tokens too"), (MaskStructure(True, cross=True), "another sequence")],
    ids=["two-way", "cross"],
)  # fmt: skip
def test_a_layer_that_looks_elsewhere_is_named(mask, sees):
    call = LayerCall(*torch.rand(3, 1, 2, 5, 4), mask, 1.0, layer=3)
    with pytest.raises(LensError, match=f"layer 3 of m sees .*{sees}"):
        check_looks_back(call, "m")
