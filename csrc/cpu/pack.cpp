// Dense prompt packing on host integers. Compiled once, for any CPU.
#include <set>
#include <utility>
#include <vector>

#include "ops.h"

namespace branchcore::cpu {

int64_t pack(TensorView lengths, int64_t capacity, int64_t window, TensorView order,
             TensorView start) {
  const auto* length = static_cast<const int64_t*>(lengths.data);
  auto* out = static_cast<int64_t*>(order.data);
  auto* starts = static_cast<int64_t*>(start.data);
  const int64_t num_items = lengths.sizes[0], stride = lengths.strides[0];

  // what may be taken, as (length, -item): before upper_bound(room) stands the longest that fits,
  // the oldest of equals
  std::set<std::pair<int64_t, int64_t>> seen;
  std::vector<char> taken(num_items, 0);
  int64_t oldest = 0, unseen = 0, count = 0, num_packs = 0;

  const auto take = [&](int64_t item) {
    out[count++] = item;
    taken[item] = 1;
    seen.erase({length[item * stride], -item});
    if (item != oldest) return;
    while (oldest < num_items && taken[oldest]) ++oldest;
    for (; unseen < num_items && static_cast<int64_t>(seen.size()) < window; ++unseen)
      if (!taken[unseen]) seen.emplace(length[unseen * stride], -unseen);
  };

  while (oldest < num_items) {
    starts[num_packs++] = count;
    int64_t room = capacity - length[oldest * stride];
    take(oldest);
    for (auto past = seen.upper_bound({room, 0}); past != seen.begin();
         past = seen.upper_bound({room, 0})) {
      const auto best = *--past;
      room -= best.first;
      take(-best.second);
    }
  }
  starts[num_packs] = count;
  return num_packs;
}

}  // namespace branchcore::cpu
