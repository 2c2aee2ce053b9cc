// What this library would take from glibc newer than 2.28 and from libstdc++ newer than GCC 8's is
// made here, so that the wheel is a manylinux_2_28 one, as torch's are. Nothing of it is exported
// (ops.map).
#include <new>
#include <sstream>
#include <string>

#if defined(__linux__) && defined(__x86_64__) && defined(__GLIBCXX__)

// GLIBCXX_3.4.26, GLIBCXX_3.4.29.
template std::basic_ostringstream<char>::basic_ostringstream();
template std::basic_stringstream<char>::basic_stringstream();
template std::string std::basic_stringbuf<char>::str() const&;
template std::string std::basic_stringbuf<char>::str() &&;
void std::__throw_bad_array_new_length() { throw std::bad_array_new_length(); }

extern "C" {

// GLIBC_2.32. 0: reference counts are always atomic.
char __libc_single_threaded = 0;

// GLIBC_2.29: the same without errno, which nobody reads here.
#define TETHER_OLD(name)                                  \
  double old_##name(double x);                            \
  __asm__(".symver old_" #name "," #name "@GLIBC_2.2.5"); \
  double name(double x) { return old_##name(x); }
TETHER_OLD(exp)
TETHER_OLD(exp2)
TETHER_OLD(log)
TETHER_OLD(log2)

}  // extern "C"

#endif
