// A library that asks for more than torch's stable ABI: the gate's own tests compile it and expect all three names.
#include <cstdint>

namespace at { int get_num_threads(); }
extern "C" int Py_IsInitialized();
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);  // strong: must be weak

int planted() { return at::get_num_threads() + Py_IsInitialized() + aoti_torch_get_current_cuda_stream(0, nullptr); }
