"""The native library with its AVX-512 code on a CPU without it: intrinsics replaced by SIMDe's
functions of the same names (Debian: libsimde-dev)."""

import hashlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from vllm_toptheta.kernels.cpu import build, native

SOURCES = Path(build.__file__).resolve().parent / "src"
# SIMDe 0.7 has everything else.
CONVERSION = """
static inline simde__m512 simde_mm512_cvtph_ps(__m256i x) {
  alignas(64) float f[16];
  _mm256_store_ps(f, _mm256_cvtph_ps(_mm256_castsi256_si128(x)));
  _mm256_store_ps(f + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1)));
  return simde_mm512_load_ps(f);
}
static inline simde__m512i simde_mm512_cvtepu16_epi32(__m256i x) {
  alignas(64) int32_t i[16];
  _mm256_store_si256((__m256i*)i, _mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)));
  _mm256_store_si256((__m256i*)(i + 8), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1)));
  return simde_mm512_load_si512(i);
}
"""


def emulated_library(cache: Path) -> native.NativeLibrary:
    """Build the library into `cache` unless it has one of these sources; skips without SIMDe."""
    sources = sorted(SOURCES.iterdir())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    folder = cache / digest
    if not (folder / build.LIBRARY_NAME).exists():
        probe = ["g++", "-fsyntax-only", "-include", "simde/x86/avx512.h", "-xc++", "/dev/null"]
        try:
            missing = subprocess.run(probe, capture_output=True, check=False).returncode
        except FileNotFoundError:
            missing = 1
        if missing:
            pytest.skip("SIMDe is not installed (Debian: libsimde-dev)")
        folder.mkdir(exist_ok=True)
        names: set[str] = set()
        for path in sources:
            names.update(re.findall(r"\b(?:_mm512_\w+|__m512[di]?|__mmask\d+)\b", path.read_text()))
        aliases = folder / "aliases.h"
        aliases.write_text(
            "#include <immintrin.h>\n#include <simde/x86/avx512.h>\n"
            + CONVERSION
            + "".join(f"#define {name} simde{name}\n" for name in sorted(names))
        )
        flags = ["-O1", "-w", "-DTOPT_EMULATE_AVX512", "-include", shlex.quote(str(aliases))]
        build.build_native(folder, flags)
    return native.load_library(folder / build.LIBRARY_NAME)
