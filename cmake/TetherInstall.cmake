# Install rules and the CMake package `tether`. One export set per component, so that a consumer
# without torch or Eigen loads only what works there.
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/tether)
set(tether_COMPONENTS "")

# tether_install(COMPONENT TARGET...)
function(tether_install component)
  install(TARGETS ${ARGN} EXPORT tether_${component}
    ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
    LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
  install(EXPORT tether_${component} NAMESPACE tether:: DESTINATION ${package_dir}
    FILE tether_${component}.cmake)
  set(tether_COMPONENTS ${tether_COMPONENTS} ${component} PARENT_SCOPE)
endfunction()

set(folders core estimators logits rl face)
tether_install(core tether_core)
tether_install(eigen tether_eigen)
if(TARGET tether_cuda)
  tether_install(cuda tether_cuda)
endif()
if(TARGET tether)
  tether_install(tether tether)
  list(APPEND folders libtorch)
endif()
if(TARGET tether_testing)
  tether_install(testing tether_testing)
  list(APPEND folders testing)
endif()
install(DIRECTORY ${folders} DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/tether
  FILES_MATCHING PATTERN "*.h")

configure_package_config_file(cmake/tetherConfig.cmake.in
  ${CMAKE_CURRENT_BINARY_DIR}/tetherConfig.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/tetherConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES
  ${CMAKE_CURRENT_BINARY_DIR}/tetherConfig.cmake
  ${CMAKE_CURRENT_BINARY_DIR}/tetherConfigVersion.cmake
  cmake/FindTetherTorch.cmake
  DESTINATION ${package_dir})
