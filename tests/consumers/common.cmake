# Helpers of the consumer tests. A step that fails stops the test with its output.
file(REMOVE_RECURSE ${WORK})
file(MAKE_DIRECTORY ${WORK})
set(configure ${CMAKE_COMMAND} -G ${GENERATOR} -DCMAKE_BUILD_TYPE=Release
  -DCMAKE_CXX_COMPILER=${COMPILER} -DCMAKE_CXX_COMPILER_LAUNCHER=${LAUNCHER})

# step(VARIABLE COMMAND...): runs it; VARIABLE gets what it printed.
function(step variable)
  list(JOIN ARGN " " line)
  message("+ ${line}")
  execute_process(COMMAND ${ARGN} OUTPUT_VARIABLE output ERROR_VARIABLE output RESULT_VARIABLE failed)
  if(failed)
    message("${output}")
    message(FATAL_ERROR "failed: ${line}")
  endif()
  set(${variable} "${output}" PARENT_SCOPE)
endfunction()

# refused(TEXT COMMAND...): the command must fail and print TEXT, line breaks aside.
function(refused text)
  list(JOIN ARGN " " line)
  message("+ ${line}")
  execute_process(COMMAND ${ARGN} OUTPUT_VARIABLE output ERROR_VARIABLE output RESULT_VARIABLE failed)
  string(REGEX REPLACE "[ \n]+" " " output "${output}")
  string(FIND "${output}" "${text}" position)
  if(NOT failed OR position EQUAL -1)
    message(FATAL_ERROR "must be refused with '${text}', got: ${output}")
  endif()
endfunction()

# expect(OUTPUT TEXT)
function(expect output text)
  string(FIND "${output}" "${text}" position)
  if(position EQUAL -1)
    message(FATAL_ERROR "must print '${text}', got '${output}'")
  endif()
endfunction()

# install(BUILD_FOLDER): into WORK/prefix by way of another folder, so that a path that was written
# into the package does not exist any more.
function(install_moved build)
  step(ignored ${CMAKE_COMMAND} --install ${build} --prefix ${WORK}/elsewhere)
  file(RENAME ${WORK}/elsewhere ${WORK}/prefix)
  file(GLOB_RECURSE files ${WORK}/prefix/*.cmake)
  foreach(file ${files})
    file(READ ${file} text)
    foreach(path ${SOURCE} ${BUILD} ${WORK} ${TORCH_ROOT})
      string(FIND "${text}" "${path}" position)
      if(NOT position EQUAL -1)
        message(FATAL_ERROR "${file} names ${path}")
      endif()
    endforeach()
  endforeach()
endfunction()
