"""The recipe's choice of a descriptor; those that are not the same are never taken for it."""

from pathlib import Path

from dedup.descriptors import descriptor_of
from dedup.sscd import Sscd
from pipeline.recipe import Dedup
from tests.tiny_onnx import FLOAT, mean_colour_onnx


def test_the_recipe_chooses_the_model() -> None:
    chosen = [descriptor_of(Dedup()), descriptor_of(Dedup(model="sscd_distilled"))]
    assert [descriptor.name for descriptor in chosen] == ["sscd", "sscd_distilled"]
    assert [descriptor.dimension for descriptor in chosen] == [512, 512]
    assert [descriptor.short_edge_px for descriptor in chosen] == [320, 320]


def test_weights_model_and_input_each_make_another_descriptor(tmp_path: Path) -> None:
    files = {
        "square.onnx": mean_colour_onnx(FLOAT, ("n", 3, 320, 320)),
        "wide.onnx": mean_colour_onnx(FLOAT, ("n", 3, 64, 96)),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    chosen = [
        descriptor_of(Dedup.model_validate({"model": model, "weights": str(tmp_path / name)}))
        for model in ("sscd", "sscd_distilled")
        for name in files
    ]
    identities = [str(descriptor.identity()) for descriptor in chosen]
    assert len(set(identities)) == 4
    wide = chosen[1]
    assert isinstance(wide, Sscd)
    assert (wide.input_size, wide.short_edge_px) == ((64, 96), 96)
