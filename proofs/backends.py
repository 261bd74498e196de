"""The rotation on a GPU backend, with all layers on the device.

A device rounds as it likes, so that what counts is the comparison: for each of the tests' models, the logits with
distinct factors may be no further from the float64 reference than those without factors are. Usage: python
proofs/backends.py vulkan|cuda. Vulkan needs no GPU: on Debian, the packages mesa-vulkan-drivers (with lavapipe, a
software device), libvulkan-dev, glslc and spirv-headers are enough. Debian 12's libvulkan-dev is too old for llama.cpp
0c1e570; the headers of Debian 13's do, unpacked anywhere: --option Vulkan_INCLUDE_DIR=DIR.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support import llama_direct, native_build, rope_models
from support.commands import CommandError, script, table
from support.rope_reference import no_noisier, rms_error

OPTIONS = {"vulkan": ("GGML_VULKAN=ON",), "cuda": ("GGML_CUDA=ON",)}
CPU = 0  # GGML_BACKEND_DEVICE_TYPE_CPU


def devices(library: Path) -> list[str]:
    """Names and descriptions of the devices that ggml finds, processors left out."""
    libraries = {}
    for name in ("ggml-base", "ggml"):
        found = [path for pattern in (f"lib{name}.so*", f"lib{name}.dylib") for path in sorted(library.glob(pattern))]
        if not found:
            raise CommandError(f"{library}: no lib{name}")
        libraries[name] = ctypes.CDLL(str(found[0]), mode=ctypes.RTLD_GLOBAL)
    get = libraries["ggml"].ggml_backend_dev_get
    get.argtypes, get.restype = [ctypes.c_size_t], ctypes.c_void_p
    name, description, kind = (
        getattr(libraries["ggml-base"], f"ggml_backend_dev_{what}") for what in ("name", "description", "type")
    )
    for function in (name, description, kind):
        function.argtypes = [ctypes.c_void_p]
    name.restype = description.restype = ctypes.c_char_p
    count = libraries["ggml"].ggml_backend_dev_count
    count.restype = ctypes.c_size_t
    found = [device for device in map(get, range(count())) if kind(device) != CPU]
    return [f"{name(device).decode()}: {description(device).decode()}" for device in found]


def noise(n_tokens: int) -> Iterator[tuple[str, float, float, float]]:
    """Per model: error without factors, with them, and how far they move the logits; root mean square, relative."""
    tokens, factors = rope_models.TOKENS[:n_tokens], rope_models.FACTORS
    ones = [1.0] * len(factors)
    for model in rope_models.MODELS:
        wanted = [rope_models.expected(model, used)[:n_tokens] for used in (ones, factors)]
        errors = []
        with llama_direct.Context(rope_models.file_of(model), model.n_ctx) as context:
            for used, want in zip((ones, factors), wanted, strict=True):
                context.clear()
                if context.set_factors(used):
                    raise CommandError(f"{model.name}: refuses the factors")
                errors.append(rms_error(context.decode(tokens), want))
        yield model.name, errors[0], errors[1], rms_error(*wanted)


def main() -> int:
    """Build, run the models on the device, print the table; exit status 1 if factors make one worse."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("backend", choices=OPTIONS)
    parser.add_argument("--library", type=Path, metavar="DIR", help="patched library with the backend (default: built)")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="for CMake, repeatable")
    parser.add_argument("--tokens", type=int, default=40, help="of each model (default: 40)")
    parser.add_argument("--layers", type=int, default=999, help="layers on the device (default: all)")
    parser.add_argument("--output", type=Path, default=native_build.WORK, help="work folder (default: build/proofs)")
    args = parser.parse_args()
    library = args.library
    if library is None:
        options = (*OPTIONS[args.backend], *args.option)
        source = native_build.patched_source(args.output)
        library = native_build.build(source, source.parent / f"build-{args.backend}", native_build.LIBRARY, options)
    if args.backend == "vulkan":
        # a software device counts too, but llama.cpp takes it only if it is named; half precision hides small errors
        os.environ.setdefault("GGML_VK_VISIBLE_DEVICES", "0")
        os.environ.setdefault("GGML_VK_DISABLE_F16", "1")
    names = devices(library)
    if not names:
        raise CommandError(f"{library}: no {args.backend} device found")
    os.environ["LLAMA_CPP_LIB_PATH"] = str(library.resolve())
    os.environ["LROPE_TEST_GPU_LAYERS"] = str(args.layers)  # the tests' client takes it from here
    rows, worse = [], 0
    for name, base, scaled, moved in noise(args.tokens):
        good = no_noisier(scaled, base) and moved > 10 * scaled
        worse += not good
        rows.append([name, f"{base:.1e}", f"{scaled:.1e}", f"{moved:.2f}", "yes" if good else "**NO**"])
    print(f"{args.backend}: {'; '.join(names)}\n")
    print(table(["model", "error, base", "error, factors", "factors move by", "no worse"], rows))
    return int(worse > 0)


if __name__ == "__main__":
    script(main)
