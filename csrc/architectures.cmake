# Which GPUs the CUDA kernels are compiled for, and whether this machine's can run them.
#
# CMAKE_CUDA_ARCHITECTURES  empty: the GPUs in this machine, or the release list where there is none; "release": that
#                           list; else CMake's own list

set(release_architectures 75-real 80 86-real 89-real 90-real 100-real 120-real)  # PTX for 80 only

# "9.0;8.6" and "580.65.06;...", empty without a GPU.
function(query_gpus what result)
  execute_process(COMMAND nvidia-smi --query-gpu=${what} --format=csv,noheader
                  OUTPUT_VARIABLE found ERROR_QUIET RESULT_VARIABLE failed)
  set(values "")
  if(NOT failed)
    string(REGEX MATCHALL "[0-9]+\\.[0-9.]*[0-9]" values "${found}")
    list(REMOVE_DUPLICATES values)
  endif()
  set(${result} "${values}" PARENT_SCOPE)
endfunction()

function(choose_architectures)
  query_gpus(compute_cap capabilities)
  # Someone building for the GPU in the machine should not wait for six others; a build machine has none.
  if(NOT CMAKE_CUDA_ARCHITECTURES AND capabilities)
    string(REPLACE "." "" capabilities "${capabilities}")
    list(TRANSFORM capabilities APPEND "-real")
    set(CMAKE_CUDA_ARCHITECTURES "${capabilities}" PARENT_SCOPE)
  elseif(NOT CMAKE_CUDA_ARCHITECTURES OR CMAKE_CUDA_ARCHITECTURES STREQUAL "release")
    set(CMAKE_CUDA_ARCHITECTURES "${release_architectures}" PARENT_SCOPE)
  endif()
endfunction()

# Machine code runs on later chips of its generation, PTX on every later chip.
function(architectures_cover capability result)
  set(covered FALSE)
  foreach(architecture IN LISTS CMAKE_CUDA_ARCHITECTURES)
    if(NOT architecture MATCHES "^([0-9]+)([0-9])a?(-real|-virtual)?$")
      set(covered TRUE)  # native, all, all-major
      break()
    endif()
    set(major ${CMAKE_MATCH_1})
    set(code "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
    set(kind "${CMAKE_MATCH_3}")
    string(REGEX MATCH "^[0-9]+" generation "${capability}")
    if(code VERSION_LESS_EQUAL capability
       AND (NOT kind STREQUAL "-real" OR major EQUAL generation))
      set(covered TRUE)
    endif()
  endforeach()
  set(${result} ${covered} PARENT_SCOPE)
endfunction()

# The kernels are built all the same: it may be for another machine.
function(warn_where_kernels_cannot_run toolkit)
  query_gpus(driver_version drivers)
  query_gpus(compute_cap capabilities)
  foreach(driver IN LISTS drivers)
    if(toolkit VERSION_GREATER_EQUAL 13 AND driver VERSION_LESS 580)
      message(WARNING "isonet_fast: kernels built by CUDA ${toolkit} need driver 580 or newer, this machine has ${driver}: "
                      "PyTorch will serve SReLU here. A toolkit of CUDA 12 builds kernels that this driver runs.")
    endif()
  endforeach()
  foreach(capability IN LISTS capabilities)
    architectures_cover(${capability} covered)
    if(NOT covered)
      message(WARNING "isonet_fast: no kernel is built for this machine's GPU of compute capability ${capability}: "
                      "PyTorch will serve SReLU here (CMAKE_CUDA_ARCHITECTURES is ${CMAKE_CUDA_ARCHITECTURES}).")
    endif()
  endforeach()
endfunction()
