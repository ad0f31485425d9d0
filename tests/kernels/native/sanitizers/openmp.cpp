// What the CPU kernels need of OpenMP, on std::thread: ThreadSanitizer sees every wait in it. libgomp waits by system
// calls of its own, which the sanitizer does not know, so each handover of data would look like a race.
//
// A team is made of new threads and ends with its region. The names are those that g++ calls (libgomp's libgomp_g.h).
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace {

class Team {
 public:
  explicit Team(unsigned threads) : threads_(threads) {}

  // the first thread that comes to a loop sets it up
  void start(long begin, long end, long step, long chunk) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (started_) return;
    started_ = true;
    next_ = begin;
    end_ = end;
    stride_ = step * chunk;
  }
  bool next(long& first, long& last) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (next_ >= end_) return false;
    first = next_;
    next_ += stride_;
    last = next_ < end_ ? next_ : end_;
    return true;
  }
  // returns when every thread of the team has come
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const unsigned round = round_;
    if (++waiting_ == threads_) {
      waiting_ = 0;
      started_ = false;
      ++round_;
      all_here_.notify_all();
    } else {
      all_here_.wait(lock, [&] { return round_ != round; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable all_here_;
  const unsigned threads_;
  unsigned waiting_ = 0, round_ = 0;
  bool started_ = false;
  long next_ = 0, end_ = 0, stride_ = 0;
};

thread_local Team* team = nullptr;

}  // namespace

extern "C" {

void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned) {
  Team own(threads);
  const auto work = [&] {
    team = &own;
    function(data);
    team = nullptr;
  };
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) { return team->next(*first, *last); }

bool GOMP_loop_nonmonotonic_dynamic_start(long begin, long end, long step, long chunk, long* first, long* last) {
  team->start(begin, end, step, chunk);
  return team->next(*first, *last);
}

void GOMP_loop_end() { team->wait(); }

int omp_in_parallel() { return team != nullptr; }

int omp_get_max_threads() { return 1; }
}
