// A CUDA runtime without a device. Device memory is host memory, kernels compute nothing, and
// everything is counted and logged. What a stream capture forbids is refused, as by the real one.
//
// Lines of the log: KERNEL, MEMCPY, MEMSET, HOSTFUNC (with CAPTURED before them during a capture,
// with ESCAPED if they run beside it), SYNC (with "in a thread" after it if that is not the main
// one), HOSTALLOC, GRAPH, CAPTURE, JOINED, and REFUSED with the function that returned an error.
// Functions that are not here are the real runtime's.
#pragma once

#include <cuda_runtime_api.h>

// A function that has nothing to do, and one that does not work here.
#define OK(name, ...) \
    cudaError_t name(__VA_ARGS__) { return cudaSuccess; }
#define UNSUPPORTED(name, ...) \
    cudaError_t name(__VA_ARGS__) { return cudaErrorNotSupported; }

extern struct null_counts {
    long launches, graph_launches;
} null_counts;
extern int null_logging;

// A line of the log.
void null_note(const char *format, ...);
// Returns the error, which cudaGetLastError also returns; the second one logs it.
cudaError_t null_error(cudaError_t error);
cudaError_t null_refuse(cudaError_t error, const char *function);
// Whether a stream is being captured.
int null_capturing(cudaStream_t stream);
// The error of a call that a capture forbids to its thread, if there is one.
cudaError_t null_unsafe(const char *function);
// Something that a stream executes: part of the graph if the stream is being captured.
void null_enqueue(const char *kind, const char *what, cudaStream_t stream);
// A launch of a kernel.
void null_launch(const char *name, cudaStream_t stream);
// The host waits; an error if a capture forbids that.
cudaError_t null_wait(const char *what, const char *function, int forbidden);
