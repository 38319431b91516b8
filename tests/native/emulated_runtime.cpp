// What the emulated library takes from the CUDA runtime, and the ways in: for the order of threads,
// and for who wants to know of launches. Compiled with -include cuemu.h.
extern "C" {
const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
const char* cudaGetErrorName(cudaError_t) { return "emulated"; }
__attribute__((visibility("default"))) void lm2_set_seed(uint64_t seed) { cuemu::seed() = seed; }
void lm2_set_device(int device) { cuemu::device() = device; }
__attribute__((visibility("default"))) void lm2_set_major(int major) { cuemu::major() = major; }
__attribute__((visibility("default"))) void lm2_set_listener(cuemu::Listener listener) {
  cuemu::listener() = listener;
}
}
