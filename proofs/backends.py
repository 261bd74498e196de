"""The numerical tests on a GPU backend, with all layers on the device.

Usage: python proofs/backends.py vulkan|cuda. Vulkan needs no GPU: on Debian, the packages mesa-vulkan-drivers (with
lavapipe, a software device), libvulkan-dev, glslc and spirv-headers are enough. Debian 12's libvulkan-dev is too old
for llama.cpp 0c1e570; the headers of Debian 13's do, unpacked anywhere: --option Vulkan_INCLUDE_DIR=DIR.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from pathlib import Path

import native
import versions

OPTIONS = {"vulkan": ("GGML_VULKAN=ON",), "cuda": ("GGML_CUDA=ON",)}
CPU = 0  # GGML_BACKEND_DEVICE_TYPE_CPU


def devices(library: Path) -> list[str]:
    """Names and descriptions of the devices that ggml finds, processors left out."""
    libraries = {}
    for name in ("ggml-base", "ggml"):
        found = [path for pattern in (f"lib{name}.so*", f"lib{name}.dylib") for path in sorted(library.glob(pattern))]
        if not found:
            raise native.ProofError(f"{library}: no lib{name}")
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


def main() -> int:
    """Build, run the tests on the device, print the table; exit status 1 if a test fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("backend", choices=OPTIONS)
    parser.add_argument("--library", type=Path, metavar="DIR", help="patched library with the backend (default: built)")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="for CMake, repeatable")
    parser.add_argument("--tests", nargs="+", metavar="FILE", help="default: tests/test_rope_*.py")
    parser.add_argument("--layers", type=int, default=999, help="layers on the device (default: all)")
    parser.add_argument("--output", type=Path, default=native.WORK, help="work folder (default: build/proofs)")
    args = parser.parse_args()
    library = args.library
    if library is None:
        options = (*OPTIONS[args.backend], *args.option)
        source = native.patched_source(args.output)
        library = native.build(source, source.parent / f"build-{args.backend}", native.LIBRARY, options)
    if args.backend == "vulkan":
        # a software device counts too, but llama.cpp takes it only if it is named
        os.environ.setdefault("GGML_VK_VISIBLE_DEVICES", "0")
    names = devices(library)
    if not names:
        raise native.ProofError(f"{library}: no {args.backend} device found")
    release = native.pinned()[0]
    bindings = versions.binding(release, native.fetch_source(args.output), args.output)
    # the tests' client takes it from here
    os.environ["LROPE_TEST_GPU_LAYERS"] = str(args.layers)
    start = time.monotonic()
    result = versions.run_tests(library, bindings, args.tests or versions.numerical_tests())
    seconds = f"{time.monotonic() - start:.0f}"
    print(native.table(["backend", "device", "tests", "seconds"], [[args.backend, "; ".join(names), result, seconds]]))
    return 0 if versions.all_passed(result) else 1


if __name__ == "__main__":
    native.script(main)
