// The CUDA kernels as csrc/cuda/bindings.cpp calls them. Torch-free.
//
// Each function launches on `stream` of the current device, allocates nothing and never waits, so
// it can be captured into a graph. It returns the error of the launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "../arguments.h"

namespace lm2::cuda {

cudaError_t memory_attention_forward(const MemoryAttentionForward& args, cudaStream_t stream);
cudaError_t memory_attention_backward(const MemoryAttentionBackward& args, cudaStream_t stream);
cudaError_t memory_update_forward(const MemoryUpdateForward& args, cudaStream_t stream);
cudaError_t memory_update_backward(const MemoryUpdateBackward& args, cudaStream_t stream);
cudaError_t residual_layer_norm_forward(const ResidualLayerNormForward& args, cudaStream_t stream);
cudaError_t residual_layer_norm_backward(const ResidualLayerNormBackward& args,
                                         cudaStream_t stream);
cudaError_t pooled_gate_forward(const PooledGateForward& args, cudaStream_t stream);
cudaError_t pooled_gate_backward(const PooledGateBackward& args, cudaStream_t stream);

// Bytes of args.workspace on the current device, from the sizes, the options and which results are
// asked for.
int64_t workspace_bytes(const MemoryAttentionBackward& args);
int64_t workspace_bytes(const ResidualLayerNormBackward& args);
int64_t workspace_bytes(const PooledGateForward& args);
int64_t workspace_bytes(const PooledGateBackward& args);

}  // namespace lm2::cuda
