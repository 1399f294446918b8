// Launches of kernels, and their names as the compiler registers them.
#include "null.h"

#include <pthread.h>
#include <stdlib.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

typedef struct {
    const void *function;
    const char *name;
} Kernel;
static Kernel *kernels;
static size_t kernel_count, kernel_room;
static int kernels_sorted;

void **__cudaRegisterFatBinary(void *binary) {
    void **handle = malloc(sizeof *handle);
    *handle = binary;
    return handle;
}
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterVar(void **handle, char *variable, char *address, const char *name, int external,
                       size_t size, int constant, int global) {}

void __cudaRegisterFunction(void **handle, const char *function, char *device_function,
                            const char *name, int thread_limit, uint3 *thread, uint3 *block,
                            dim3 *block_dim, dim3 *grid_dim, int *warp_size) {
    pthread_mutex_lock(&lock);
    if (kernel_count == kernel_room) {
        kernel_room = kernel_room ? 2 * kernel_room : 65536;
        kernels = realloc(kernels, kernel_room * sizeof(Kernel));
    }
    kernels[kernel_count++] = (Kernel){function, name};
    kernels_sorted = 0;
    pthread_mutex_unlock(&lock);
}

static int by_function(const void *a, const void *b) {
    const Kernel *one = a, *other = b;
    return one->function < other->function ? -1 : one->function > other->function;
}

static const char *kernel_name(const void *function) {
    Kernel key = {function, 0};
    pthread_mutex_lock(&lock);
    if (!kernels_sorted) qsort(kernels, kernel_count, sizeof(Kernel), by_function);
    kernels_sorted = 1;
    Kernel *found = bsearch(&key, kernels, kernel_count, sizeof(Kernel), by_function);
    pthread_mutex_unlock(&lock);
    return found ? found->name : "unnamed";
}

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

// kernel<<<grid, block, shared, stream>>> pushes these, and the kernel's host function pops them.
static __thread struct {
    dim3 grid, block;
    size_t shared;
    void *stream;
} configurations[8];
static __thread int configuration_count;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared,
                                     struct CUstream_st *stream) {
    int top = configuration_count++;
    configurations[top].grid = grid;
    configurations[top].block = block;
    configurations[top].shared = shared;
    configurations[top].stream = stream;
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    int top = --configuration_count;
    *grid = configurations[top].grid;
    *block = configurations[top].block;
    *shared = configurations[top].shared;
    *(void **)stream = configurations[top].stream;
    return cudaSuccess;
}

void null_launch(const char *name, cudaStream_t stream) {
    null_counts.launches++;
    null_enqueue("KERNEL", name, stream);
}

static cudaError_t launch(const void *function, cudaStream_t stream) {
    null_launch(null_logging ? kernel_name(function) : "", stream);
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments,
                             size_t shared, cudaStream_t stream) {
    return launch(function, stream);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments,
                               size_t shared, cudaStream_t stream) {
    return launch((const void *)kernel, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function,
                                void **arguments) {
    return launch(function, config->stream);
}
