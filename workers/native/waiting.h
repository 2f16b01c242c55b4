// How a thread waits for a counter that another thread, or a process that shares the memory, changes.
#pragma once

#include <atomic>
#include <cstdint>
#include <ctime>

#ifdef __linux__
#include <climits>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// A short pause that leaves the core to its other hardware thread.
inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Sleeps while `counter` is `seen`, no longer than `nanoseconds`; may end early.
inline void nap(std::atomic<uint32_t>& counter, uint32_t seen, int64_t nanoseconds) {
  const timespec time = {nanoseconds / 1'000'000'000, nanoseconds % 1'000'000'000};
#ifdef __linux__
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&counter), FUTEX_WAIT, seen, &time, nullptr, 0);
#else
  (void)counter, (void)seen;
  nanosleep(&time, nullptr);
#endif
}

// Ends the naps at `counter`.
inline void wake(std::atomic<uint32_t>& counter) {
#ifdef __linux__
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&counter), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
#else
  (void)counter;
#endif
}

}  // namespace
