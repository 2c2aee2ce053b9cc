#pragma once

// The vector loops need every function that they call inside them: a call, even of a small
// function, is a lost vectorisation. Under nvcc the same functions run on the device too.
#if defined(__CUDACC__)
#define TETHER_INLINE __host__ __device__ __forceinline__
#define TETHER_FORMULA __host__ __device__ __forceinline__
#else
#define TETHER_INLINE [[gnu::always_inline]] inline
#define TETHER_FORMULA [[gnu::always_inline]]
#endif

// What the threads of a team run (core/team.h): device code, which the tests run on the host.
#if defined(__CUDACC__)
#define TETHER_TEAM __device__ __forceinline__
#define TETHER_UNROLL _Pragma("unroll")
#else
#define TETHER_TEAM inline
#define TETHER_UNROLL
#endif

// A function with a vector loop is compiled once per instruction set and chosen when the program is
// loaded. Empty where that does not work: ThreadSanitizer dies in the resolvers, clang has no
// clones of templates. TETHER_NO_CLONES: tests build the same files once per -march instead.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && !defined(TETHER_NO_CLONES)
#define TETHER_CLONES [[gnu::target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")]]
#else
#define TETHER_CLONES
#endif

// For a vector loop in a header: the options of the library's own files (cmake/TetherTargets.cmake)
// whatever the including file is compiled with, so that it has the same bits and the same speed.
#if defined(__GNUC__) && !defined(__clang__)
#define TETHER_HEADER_CLONES                                                    \
  [[gnu::optimize("O3", "no-math-errno", "no-trapping-math", "fp-contract=off", \
                  "no-thread-jumps")]] TETHER_CLONES
#else
#define TETHER_HEADER_CLONES TETHER_CLONES
#endif
