// Value checks that keep kernels inside their tensors. Compiled once, for any CPU.
#include <stdexcept>
#include <string>

#include "ops.h"

namespace branchcore::cpu {

void check_child_start(const char* op, TensorView child_start, int64_t num_children) {
  const auto* starts = static_cast<const int64_t*>(child_start.data);
  int64_t last = 0;
  bool rising = child_start.sizes[0] > 0 && starts[0] == 0;
  for (int64_t n = 0; n < child_start.sizes[0]; ++n) {
    const int64_t start = starts[n * child_start.strides[0]];
    rising = rising && start >= last;
    last = start;
  }
  if (!rising || last != num_children)
    throw std::invalid_argument(std::string(op) + ": child_start must be rising from 0 to " +
                                std::to_string(num_children) + ", got one that ends at " +
                                std::to_string(last) + (rising ? "" : " and does not rise from 0"));
}

void check_table_rows(const char* op, TensorView row, TensorView first, TensorView second,
                      TensorView third) {
  const TensorView* given = &first;
  if (given->dtype == DType::kNone) given = &second;
  if (given->dtype == DType::kNone) given = &third;
  if (given->dtype == DType::kNone) return;
  const int64_t num_rows = given->sizes[0];
  for (int64_t sample = 0; sample < row.sizes[0]; ++sample) {
    const int64_t index = static_cast<const int64_t*>(row.data)[sample * row.strides[0]];
    if (index < 0 || index >= num_rows)
      throw std::invalid_argument(std::string(op) + ": row_B must be from 0 to " +
                                  std::to_string(num_rows - 1) + ", got " + std::to_string(index));
  }
}

}  // namespace branchcore::cpu
