# Brings the llama.cpp source and applies patches/ to it.

set(LROPE_PATCH_DIR "${CMAKE_CURRENT_LIST_DIR}/../patches")
get_filename_component(LROPE_PATCH_DIR "${LROPE_PATCH_DIR}" ABSOLUTE)

# The source that the pinned llama-cpp-python release vendors, so that library and binding always match.
# pip checks the hash and honours the user's own index, proxy and cache. Sets OUT to its folder, OUT_COMMIT to its commit.
function(lrope_fetch_llama_cpp out)
    set(requirement "${LROPE_PATCH_DIR}/source.txt")
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${requirement}")

    file(STRINGS "${requirement}" line REGEX "^llama-cpp-python==")
    string(REGEX MATCH "==([^ ]+) --hash=sha256:([0-9a-f]+)" line "${line}")
    set(version "${CMAKE_MATCH_1}")
    set(hash    "${CMAKE_MATCH_2}")
    file(STRINGS "${requirement}" line REGEX "^# llama.cpp commit ")
    string(REGEX MATCH "commit ([0-9a-f]+)" line "${line}")
    set(commit  "${CMAKE_MATCH_1}")
    if (NOT hash OR NOT commit)
        message(FATAL_ERROR "${requirement}: expected '# llama.cpp commit COMMIT' and 'llama-cpp-python==VERSION --hash=sha256:HASH'")
    endif()
    set(${out}_COMMIT "${commit}" PARENT_SCOPE)

    set(top    "${CMAKE_BINARY_DIR}/source")
    set(source "${top}/llama_cpp_python-${version}/vendor/llama.cpp")
    set(${out} "${source}" PARENT_SCOPE)

    # a changed series starts from a clean source
    lrope_series_hash(series)
    set(stamp "")
    if (EXISTS "${top}/complete")
        file(READ "${top}/complete" stamp)
    endif()
    if (stamp STREQUAL "${hash} ${series}")
        return()
    endif()

    set(archive "${CMAKE_BINARY_DIR}/llama_cpp_python-${version}.tar.gz")
    set(found "")
    if (EXISTS "${archive}")
        file(SHA256 "${archive}" found)
    endif()
    if (NOT found STREQUAL hash)
        find_package(Python3 3.9 REQUIRED COMPONENTS Interpreter)
        message(STATUS "Fetching llama-cpp-python ${version} with pip")
        execute_process(
            COMMAND "${Python3_EXECUTABLE}" -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes
                    --no-binary llama-cpp-python --dest "${CMAKE_BINARY_DIR}" --requirement "${requirement}"
            RESULT_VARIABLE result ERROR_VARIABLE error OUTPUT_QUIET)
        if (NOT result EQUAL 0)
            message(FATAL_ERROR "Fetching llama-cpp-python ${version} failed. Check the network, or give a llama.cpp checkout "
                                "with -DLLAMA_CPP_DIR=PATH. pip said:\n${error}")
        endif()
        file(SHA256 "${archive}" found)
        if (NOT found STREQUAL hash)
            message(FATAL_ERROR "${archive}: SHA-256 is ${found}, expected ${hash}")
        endif()
    endif()

    file(REMOVE_RECURSE "${top}")
    file(ARCHIVE_EXTRACT INPUT "${archive}" DESTINATION "${top}" PATTERNS "*/vendor/llama.cpp/*")
    # points to a repository that does not exist here
    file(REMOVE "${source}/.git")
    file(WRITE "${top}/complete" "${hash} ${series}")
endfunction()

function(lrope_series out)
    file(GLOB patches "${LROPE_PATCH_DIR}/[0-9]*.patch")
    list(SORT patches)
    set(${out} ${patches} "${LROPE_PATCH_DIR}/fallback/ctx-other.patch" PARENT_SCOPE)
endfunction()

function(lrope_series_hash out)
    lrope_series(patches)
    set(all "")
    foreach (patch ${patches})
        file(SHA256 "${patch}" hash)
        string(APPEND all "${hash}")
    endforeach()
    string(SHA256 all "${all}")
    set(${out} "${all}" PARENT_SCOPE)
endfunction()

# Applies the series as a whole or not at all; does nothing where it already is applied.
function(lrope_apply_patches source)
    find_package(Git REQUIRED)
    lrope_series(patches)
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${patches})

    # one file: git checks the patches of a file one after the other only inside one input
    set(series "")
    file(READ "${source}/src/llama-cparams.h" cparams)
    foreach (patch ${patches})
        if (patch MATCHES "/fallback/ctx-other" AND cparams MATCHES "ctx_other")
            continue()
        endif()
        file(READ "${patch}" text)
        string(APPEND series "${text}\n")
    endforeach()
    file(WRITE "${CMAKE_BINARY_DIR}/series.patch" "${series}")

    # the source may lie inside another repository (ours), whose paths git must not mix in
    get_filename_component(parent "${source}" DIRECTORY)
    set(git "${CMAKE_COMMAND}" -E env "GIT_CEILING_DIRECTORIES=${parent}" "${GIT_EXECUTABLE}" apply
        --ignore-whitespace) # older sources indent some of the context otherwise

    execute_process(COMMAND ${git} --reverse --check "${CMAKE_BINARY_DIR}/series.patch" WORKING_DIRECTORY "${source}"
        RESULT_VARIABLE applied ERROR_QUIET OUTPUT_QUIET)
    if (applied EQUAL 0)
        message(STATUS "llama.cpp is already patched: ${source}")
        return()
    endif()

    execute_process(COMMAND ${git} "${CMAKE_BINARY_DIR}/series.patch" WORKING_DIRECTORY "${source}"
        RESULT_VARIABLE result ERROR_VARIABLE error OUTPUT_QUIET)
    if (NOT result EQUAL 0)
        message(FATAL_ERROR "The patches do not apply to ${source}: this llama.cpp has drifted from the one that they were "
                            "made for, or carries an older series. See patches/README.md on refreshing them. git said:\n${error}")
    endif()
    message(STATUS "llama.cpp is patched: ${source}")
endfunction()
