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

# What the series consists of: the folders of patches/ in the order of their names, each with its hooks.patch and the files
# that it adds, laid out as llama.cpp is.
function(lrope_series out)
    file(GLOB_RECURSE series "${LROPE_PATCH_DIR}/*/*")
    list(SORT series)
    set(${out} ${series} PARENT_SCOPE)
endfunction()

function(lrope_series_hash out)
    lrope_series(series)
    set(all "")
    foreach (path ${series})
        file(SHA256 "${path}" hash)
        file(RELATIVE_PATH name "${LROPE_PATCH_DIR}" "${path}")
        string(APPEND all "${name} ${hash}\n")
    endforeach()
    string(SHA256 all "${all}")
    set(${out} "${all}" PARENT_SCOPE)
endfunction()

# The folders of the patches that SOURCE can have: up to the first one that needs what SOURCE lacks ("Needs: FILE NAME" in the
# message of a patch), at most the first LROPE_PATCHES of them.
function(lrope_usable_patches source out)
    file(GLOB patches "${LROPE_PATCH_DIR}/*/hooks.patch")
    list(SORT patches)
    if (LROPE_PATCHES)
        list(SUBLIST patches 0 ${LROPE_PATCHES} patches)
    endif()
    set(usable "")
    foreach (patch ${patches})
        get_filename_component(folder "${patch}" DIRECTORY)
        get_filename_component(name "${folder}" NAME)
        file(STRINGS "${patch}" needs REGEX "^Needs: [^ ]+ [A-Za-z0-9_]+$")
        foreach (need ${needs})
            string(REGEX MATCH "^Needs: ([^ ]+) (.+)$" need "${need}")
            set(found "")
            if (EXISTS "${source}/${CMAKE_MATCH_1}")
                file(STRINGS "${source}/${CMAKE_MATCH_1}" found LIMIT_COUNT 1
                    REGEX "(^|[^A-Za-z0-9_])${CMAKE_MATCH_2}($|[^A-Za-z0-9_])")
            endif()
            if (NOT found)
                set(lacks "${source}/${CMAKE_MATCH_1} has no ${CMAKE_MATCH_2}")
                if (NOT usable)
                    message(FATAL_ERROR "The patches cannot be used: ${lacks}. Use another llama.cpp, see patches/README.md. "
                                        "Nothing was changed.")
                endif()
                message(WARNING "The patches from ${name} on are left out: ${lacks}. What they add will be missing.")
                set(${out} ${usable} PARENT_SCOPE)
                return()
            endif()
        endforeach()
        list(APPEND usable "${folder}")
    endforeach()
    set(${out} ${usable} PARENT_SCOPE)
endfunction()

# Adds the files and applies the hooks of the usable patches, as a whole or not at all; does nothing where that was done before.
function(lrope_apply_patches source)
    find_package(Git REQUIRED)
    lrope_series(series)
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${series})
    lrope_usable_patches("${source}" patches)

    # one file: git checks the patches of a file one after the other only inside one input
    set(hooks "")
    set(files "")
    set(missing "")
    set(reasons "")
    set(stage "${source}/.lrope-gguf")
    foreach (patch ${patches})
        file(READ "${patch}/hooks.patch" text)
        string(APPEND hooks "${text}\n")
        # what is there already
        file(GLOB_RECURSE added RELATIVE "${patch}" "${patch}/*")
        list(REMOVE_ITEM added hooks.patch)
        foreach (file ${added})
            list(APPEND files "${file}")
            if (NOT EXISTS "${source}/${file}")
                list(APPEND missing "${file}")
                continue()
            endif()
            file(SHA256 "${patch}/${file}" ours)
            file(SHA256 "${source}/${file}" found)
            if (NOT found STREQUAL ours)
                string(APPEND reasons "${file} is there with other content.\n")
            endif()
        endforeach()
    endforeach()
    file(WRITE "${CMAKE_BINARY_DIR}/series.patch" "${hooks}")
    set(apply "${GIT_EXECUTABLE}" apply "${CMAKE_BINARY_DIR}/series.patch"
        --ignore-whitespace) # older sources indent some of the context otherwise

    # the source may lie inside another repository (ours), whose paths git must not mix in
    get_filename_component(parent "${source}" DIRECTORY)
    execute_process(COMMAND "${CMAKE_COMMAND}" -E env "GIT_CEILING_DIRECTORIES=${parent}" ${apply} --reverse --check
        WORKING_DIRECTORY "${source}" RESULT_VARIABLE result ERROR_QUIET OUTPUT_QUIET)
    if (result EQUAL 0 AND NOT missing AND NOT reasons)
        message(STATUS "llama.cpp is already patched: ${source}")
        return()
    endif()

    # everything that can fail is done to copies of the files, which are then moved into place
    file(REMOVE_RECURSE "${stage}")
    foreach (patch ${patches})
        file(COPY "${patch}/" DESTINATION "${stage}" PATTERN hooks.patch EXCLUDE)
    endforeach()
    string(REGEX MATCHALL "\n\\+\\+\\+ b/[^\n]+" changed "${hooks}")
    list(TRANSFORM changed REPLACE "^\n... b/" "")
    list(REMOVE_DUPLICATES changed)
    foreach (file ${changed})
        if (EXISTS "${source}/${file}")
            get_filename_component(folder "${stage}/${file}" DIRECTORY)
            file(COPY "${source}/${file}" DESTINATION "${folder}")
        endif()
    endforeach()
    execute_process(COMMAND "${CMAKE_COMMAND}" -E env "GIT_CEILING_DIRECTORIES=${source}" ${apply}
        WORKING_DIRECTORY "${stage}" RESULT_VARIABLE result ERROR_VARIABLE error OUTPUT_QUIET)
    if (NOT result EQUAL 0)
        string(APPEND reasons "git said:\n${error}")
    endif()
    if (reasons)
        file(REMOVE_RECURSE "${stage}")
        message(FATAL_ERROR "The patches do not apply to ${source}: this llama.cpp has drifted from the one that they were "
                            "made for, or carries an older series. See patches/README.md on refreshing them; "
                            "-DLROPE_PATCHES=1 takes the layer factors alone. Nothing was changed.\n${reasons}")
    endif()
    foreach (file ${files} ${changed})
        file(RENAME "${stage}/${file}" "${source}/${file}")
    endforeach()
    file(REMOVE_RECURSE "${stage}")
    message(STATUS "llama.cpp is patched: ${source}")
endfunction()
