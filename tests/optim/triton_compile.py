"""Compile every kernel of Triton for an H100, which takes no GPU, and check its instructions."""

import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lit_fanions.lmo import triton_products
from lit_fanions.optim import triton_passes

TYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
ALIGNED = {"n", "out", "x", "addend", "step", "captured", "size", "side", "inner"}


def compiled(kernel, types: dict[str, str], constants: dict[str, object], **options) -> str:
    """Return the PTX of a kernel for argument types and constants, after it was assembled."""
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        constants,
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in ALIGNED},
    )
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert found.asm["cubin"]
    print(kernel.__name__)
    return found.asm["ptx"]


def assert_wide(ptx: str) -> None:
    """Assert that some accesses are 16 bytes wide and none of several entries is narrower."""
    assert "ld.global.v4" in ptx and "st.global.v4" in ptx
    assert not re.search(r"(ld|st)\.global\S*\.v2", ptx)


def compile_passes() -> None:
    shared = {"size": "i32", "matrices": "i32", "programs": "i32", "finite": "*i1", "rest": "fp32"}
    for number in (None, "*fp64"):
        for momentum, gradient, n in (("fp32", "fp32", "bf16"), ("bf16", "bf16", "bf16"),
                                      ("fp32", "fp16", "fp32")):  # fmt: skip
            types = {**shared, "n": f"*{n}", "partials": "*fp32", "momenta": "*i64",
                     "gradients": "*i64"}  # fmt: skip
            constants = {"MOMENTUM": TYPES[momentum], "GRADIENT": TYPES[gradient], "SKIP": True,
                         "FEEDBACK": number is not None, "NESTEROV": number is None,
                         "ALIGNED": True, "BLOCK": 2048}  # fmt: skip
            optional = {"device_rest": number}
            types |= {name: kind for name, kind in optional.items() if kind}
            constants |= {name: None for name, kind in optional.items() if not kind}
            assert_wide(compiled(triton_passes._momentum_kernel, types, constants))
        types = {**shared, "weights": "*i64", "step": "*bf16", "radius": "fp32", "lr": "fp32",
                 "decay": "fp32"}  # fmt: skip
        constants = {"WEIGHT": tl.float32, "MOMENTUM": tl.float32, "DECAYS": True,
                     "CAUTIOUS": number is not None, "ALIGNED": True, "BLOCK": 2048}  # fmt: skip
        optional = {"device_numbers": "*fp64", "momenta": "*i64", "captured": "*fp32",
                    "norms": "*fp32"}  # fmt: skip
        if number:
            types |= optional
        else:
            constants |= dict.fromkeys(optional)
        assert_wide(compiled(triton_passes._weight_kernel, types, constants))
    types = {"n": "*bf16", "partials": "*fp32", "size": "i32", "programs": "i32"}
    constants = {"PARTS": 256, "BLOCK": 2048}
    assert_wide(compiled(triton_passes._division_kernel, types, constants))


def compile_products() -> None:
    numbers = dict.fromkeys(("a", "b", "c"), "fp32")
    sizes = dict.fromkeys(("side", "inner", "batch_stride"), "i32")
    constants = {"BLOCK": triton_products._BLOCK, "DEPTH": triton_products._DEPTH}
    for contiguous, other, addend in (("column_stride", "row_stride", None),
                                      ("column_stride", "row_stride", "*fp16"),
                                      ("row_stride", "column_stride", None)):  # fmt: skip
        kind = addend or "*bf16"
        types = {"out": kind, "x": kind, other: "i32", **numbers, **sizes}
        types |= {"addend": addend} if addend else {}
        own = {**constants, contiguous: 1, **({} if addend else {"addend": None})}
        ptx = compiled(triton_products._symmetric_kernel, types, own, num_warps=8, num_stages=3)
        assert "wgmma" in ptx


if __name__ == "__main__":
    compile_passes()
    compile_products()
