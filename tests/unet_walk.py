"""Checks that the blocks of a UNet fit together, and what its down path leaves for its up path."""

from __future__ import annotations

from nas.network import NetworkSpec


def walk(spec: NetworkSpec) -> None:
    """Runs the shapes through the blocks, as a forward would, and checks every input against what is there."""
    shape = spec.input
    x: tuple[int, ...] = (shape.channels, shape.height, shape.width)
    temb: tuple[int, ...] | None = None
    outputs: dict[str, tuple[int, ...]] = {}
    for block in spec.blocks:
        got = dict(block.inputs)
        if block.kind == "time_embedding":
            assert got == {"timestep": ()}
            temb = (int(block.setting("time_width")),)
            continue
        if block.kind == "text_time":
            assert got == {"temb": temb, "pooled": (shape.pooled_width,), "size_ids": (shape.size_ids,)}
            continue
        expected = {"x": x}
        if block.kind in ("resnet", "separable"):
            if block.skip is not None:
                expected["skip"] = outputs[block.skip]
            assert temb is not None
            expected["temb"] = temb
            assert block.setting("in_channels") == x[0] + (outputs[block.skip][0] if block.skip else 0)
            assert block.setting("time_width") == temb[0]
            x = (int(block.setting("out_channels")), *x[1:])
        elif block.kind == "transformer":
            expected["text"] = (shape.text_tokens, shape.text_width)
            assert block.setting("channels") == x[0]
            assert block.setting("text_width") == shape.text_width
        elif block.kind == "downsample":
            assert block.setting("channels") == x[0]
            assert x[1] % 2 == x[2] % 2 == 0
            x = (x[0], x[1] // 2, x[2] // 2)
        elif block.kind == "upsample":
            assert block.setting("channels") == x[0]
            x = (x[0], 2 * x[1], 2 * x[2])
        else:
            assert block.kind in ("stem", "head")
            assert block.setting("in_channels") == x[0]
            x = (int(block.setting("out_channels")), *x[1:])
        assert got == expected, block.name
        outputs[block.name] = x
    assert x == (shape.channels, shape.height, shape.width)


def unit_outputs(spec: NetworkSpec) -> list[str]:
    """What the down path leaves for the up path, oldest first: stem, the last block of each unit, downsamplers."""
    kept: list[str] = []
    for block in spec.blocks:
        if block.name.startswith("mid_block"):
            break
        if block.kind == "transformer":
            kept[-1] = block.name
        elif block.kind not in ("time_embedding", "text_time"):
            kept.append(block.name)
    return kept
