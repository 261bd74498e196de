# GCC 12 tells its optimizer that _tile_loadconfig reads 8 bytes, where it reads 64, and drops the stores of the others
# (amxtileintrin.h). A ggml that was built so ends with "Illegal instruction" at the first product with a quantized weight,
# on a processor with AMX. There ggml's kernels for AMX are compiled with all stores kept; where that does not help either,
# they are left out, and those for AVX-512 take their place.
#
# Included before llama.cpp's targets are made, those of our build and those of the stock one that tests compare with.

get_property(seen GLOBAL PROPERTY LROPE_AMX_SEEN) # llama.cpp and ggml are a project each
set_property(GLOBAL PROPERTY LROPE_AMX_SEEN ON)
if (seen OR CMAKE_CROSSCOMPILING OR
        NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU" OR NOT CMAKE_SYSTEM_PROCESSOR STREQUAL "x86_64")
    return()
endif()

include(CheckCXXSourceRuns)

set(LROPE_AMX_PROGRAM [[
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
]])

set(LROPE_KEEP_STORES -fno-dse -fno-tree-dse)

set(CMAKE_REQUIRED_FLAGS "-O3 -march=native")
check_cxx_source_runs("${LROPE_AMX_PROGRAM}" LROPE_AMX_WORKS)
if (NOT LROPE_AMX_WORKS)
    string(JOIN " " CMAKE_REQUIRED_FLAGS ${CMAKE_REQUIRED_FLAGS} ${LROPE_KEEP_STORES})
    check_cxx_source_runs("${LROPE_AMX_PROGRAM}" LROPE_AMX_WORKS_WITH_STORES)
endif()
unset(CMAKE_REQUIRED_FLAGS)

function(lrope_mend_amx)
    if (NOT TARGET ggml-cpu)
        return()
    endif()
    if (LROPE_AMX_WORKS_WITH_STORES)
        get_target_property(sources ggml-cpu SOURCES)
        list(FILTER sources INCLUDE REGEX "/amx/.*\\.cpp$")
        get_target_property(folder ggml-cpu SOURCE_DIR)
        list(TRANSFORM sources PREPEND "${folder}/")
        set_property(SOURCE ${sources} TARGET_DIRECTORY ggml-cpu APPEND PROPERTY COMPILE_OPTIONS ${LROPE_KEEP_STORES})
    else()
        target_compile_options(ggml-cpu PRIVATE -U__AMX_INT8__)
    endif()
endfunction()

if (NOT LROPE_AMX_WORKS)
    message(STATUS "this compiler would break ggml's kernels for AMX: they are compiled with care, or left out")
    cmake_language(DEFER DIRECTORY "${CMAKE_SOURCE_DIR}" CALL lrope_mend_amx)
endif()
