# GCC 12 tells its optimizer that _tile_loadconfig reads 8 bytes, where it reads 64, and drops the others (amxtileintrin.h).
# A ggml that was built so ends with "Illegal instruction" at the first product with a quantized weight, on a processor with AMX.
# Where the compiler does that, ggml's kernels for AMX are left out; those for AVX-512 take their place.
#
# Included before llama.cpp's targets are made, those of our build and those of the stock one that tests compare with.

get_property(seen GLOBAL PROPERTY LROPE_AMX_SEEN) # llama.cpp and ggml are a project each
set_property(GLOBAL PROPERTY LROPE_AMX_SEEN ON)
if (seen OR CMAKE_CROSSCOMPILING OR
        NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU" OR NOT CMAKE_SYSTEM_PROCESSOR STREQUAL "x86_64")
    return()
endif()

include(CheckCXXSourceRuns)

set(CMAKE_REQUIRED_FLAGS "-O3 -march=native")
check_cxx_source_runs([[
#ifdef __AMX_INT8__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

struct config { unsigned char palette, start, reserved[14]; unsigned short colsb[16]; unsigned char rows[16]; };

int main() {
    if (syscall(SYS_arch_prctl, 0x1023, 18)) {
        return 0; // ARCH_REQ_XCOMP_PERM: not given, and ggml does without AMX
    }
    alignas(64) config given = {};
    alignas(64) config taken = {};
    given.palette  = 1;
    given.colsb[0] = 64;
    given.rows[0]  = 16;
    _tile_loadconfig(&given);
    asm volatile("sttilecfg %0" : "=m"(taken));
    return taken.rows[0] == 16 && taken.colsb[0] == 64 ? 0 : 1;
}
#else
int main() { return 0; }
#endif
]] LROPE_AMX_WORKS)
unset(CMAKE_REQUIRED_FLAGS)

function(lrope_leave_out_amx)
    if (TARGET ggml-cpu)
        target_compile_options(ggml-cpu PRIVATE -U__AMX_INT8__)
    endif()
endfunction()

if (NOT LROPE_AMX_WORKS)
    message(STATUS "this compiler would break ggml's kernels for AMX: they are left out")
    cmake_language(DEFER DIRECTORY "${CMAKE_SOURCE_DIR}" CALL lrope_leave_out_amx)
endif()
