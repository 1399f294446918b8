// The driver API, as far as PyTorch, Triton, NCCL and DALI look for it. A launch of a Triton kernel
// is one of the runtime's (runtime.c, which is preloaded and found by name).
#define _GNU_SOURCE
#include <cuda.h>
// Functions are defined under the names of both versions.
#undef cuCtxPushCurrent
#undef cuCtxPopCurrent
#undef cuGetProcAddress

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define OK(name, ...) \
    CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }
#define RUNTIME(type, name, ...) ((type(*)(__VA_ARGS__))dlsym(RTLD_DEFAULT, name))

static CUcontext context = (CUcontext)16;  // the only one, never read

// ---- Devices and contexts

OK(cuInit, unsigned flags)
CUresult cuDriverGetVersion(int *version) {
    *version = 13020;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice *device, int number) {
    *device = number;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int *count) {
    return (CUresult)RUNTIME(int, "cudaGetDeviceCount", int *)(count);
}
CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
    snprintf(name, size, "NVIDIA H200 (none)");
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetUuid(CUuuid *id, CUdevice device) {
    memset(id, device, sizeof *id);
    return CUDA_SUCCESS;
}
CUresult cuDeviceTotalMem_v2(size_t *size, CUdevice device) {
    size_t free;
    return (CUresult)RUNTIME(int, "cudaMemGetInfo", size_t *, size_t *)(&free, size);
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute name, CUdevice device) {
    return (CUresult)RUNTIME(int, "cudaDeviceGetAttribute", int *, int, int)(value, name, device);
}
CUresult cuCtxGetCurrent(CUcontext *current) {
    *current = context;
    return CUDA_SUCCESS;
}
OK(cuCtxSetCurrent, CUcontext chosen)
OK(cuCtxPushCurrent, CUcontext chosen)
OK(cuCtxPushCurrent_v2, CUcontext chosen)
CUresult cuCtxPopCurrent(CUcontext *popped) { return cuCtxGetCurrent(popped); }
CUresult cuCtxPopCurrent_v2(CUcontext *popped) { return cuCtxGetCurrent(popped); }
CUresult cuCtxGetDevice(CUdevice *device) {
    return (CUresult)RUNTIME(int, "cudaGetDevice", int *)(device);
}
CUresult cuCtxSynchronize(void) { return (CUresult)RUNTIME(int, "cudaDeviceSynchronize", void)(); }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
    *value = 0;
    return CUDA_SUCCESS;
}
OK(cuCtxSetLimit, CUlimit limit, size_t value)
CUresult cuDevicePrimaryCtxRetain(CUcontext *retained, CUdevice device) {
    return cuCtxGetCurrent(retained);
}
OK(cuDevicePrimaryCtxRelease_v2, CUdevice device)
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}

// ---- Modules and kernels

typedef struct {
    char name[256];
} Kernel;

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    *module = malloc(8);
    return CUDA_SUCCESS;
}
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count,
                            CUjit_option *options, void **values) {
    return cuModuleLoadData(module, image);
}
CUresult cuModuleLoad(CUmodule *module, const char *file) { return cuModuleLoadData(module, file); }
OK(cuModuleUnload, CUmodule module)
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    Kernel *kernel = calloc(1, sizeof *kernel);
    snprintf(kernel->name, sizeof kernel->name, "triton:%.240s", name);
    *function = (CUfunction)kernel;
    return CUDA_SUCCESS;
}
CUresult cuModuleGetGlobal_v2(CUdeviceptr *address, size_t *size, CUmodule module,
                              const char *name) {
    return CUDA_ERROR_NOT_FOUND;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute name, CUfunction function) {
    *value = name == CU_FUNC_ATTRIBUTE_NUM_REGS                ? 32
             : name == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
                                                               : 0;
    return CUDA_SUCCESS;
}
OK(cuFuncSetAttribute, CUfunction function, CUfunction_attribute name, int value)
OK(cuFuncSetCacheConfig, CUfunction function, CUfunc_cache config)
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function,
                                      const CUlaunchConfig *config) {
    *count = 66;
    return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, CUfunction function, int threads,
                                                     size_t shared) {
    *count = 2;
    return CUDA_SUCCESS;
}

static CUresult launch(CUfunction function, CUstream stream) {
    RUNTIME(void, "null_launch", const char *, CUstream)(((Kernel *)function)->name, stream);
    return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                        unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                        CUstream stream, void **arguments, void **extra) {
    return launch(function, stream);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments,
                          void **extra) {
    return launch(function, config->hStream);
}
CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned grid_x, unsigned grid_y,
                                   unsigned grid_z, unsigned block_x, unsigned block_y,
                                   unsigned block_z, unsigned shared, CUstream stream,
                                   void **arguments) {
    return launch(function, stream);
}

// ---- Streams and memory

CUresult cuStreamSynchronize(CUstream stream) {
    return (CUresult)RUNTIME(int, "cudaStreamSynchronize", CUstream)(stream);
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    return (CUresult)RUNTIME(int, "cudaStreamIsCapturing", CUstream, void *)(stream, status);
}
CUresult cuMemsetD32Async(CUdeviceptr address, unsigned value, size_t count, CUstream stream) {
    return CUDA_SUCCESS;
}
CUresult cuMemsetD8Async(CUdeviceptr address, unsigned char value, size_t count, CUstream stream) {
    return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute name, CUdeviceptr address) {
    if (name == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
        *(CUdeviceptr *)value = address;
    else if (value)
        *(int *)value = CU_MEMORYTYPE_DEVICE;
    return CUDA_SUCCESS;
}
CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute *names, void **values,
                                CUdeviceptr address) {
    for (unsigned i = 0; i < count; i++) cuPointerGetAttribute(values[i], names[i], address);
    return CUDA_SUCCESS;
}
// Reserved addresses are memory already, so that mapping has nothing to do.
CUresult cuMemAddressReserve(CUdeviceptr *address, size_t size, size_t alignment, CUdeviceptr at,
                             unsigned long long flags) {
    void *start = mmap(0, size, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    *address = (CUdeviceptr)start;
    return start == MAP_FAILED ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}
CUresult cuMemAddressFree(CUdeviceptr address, size_t size) {
    munmap((void *)address, size);
    return CUDA_SUCCESS;
}
CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size,
                     const CUmemAllocationProp *properties, unsigned long long flags) {
    *handle = size;
    return CUDA_SUCCESS;
}
CUresult cuMemGetAllocationGranularity(size_t *size, const CUmemAllocationProp *properties,
                                       CUmemAllocationGranularity_flags option) {
    *size = 2 << 20;
    return CUDA_SUCCESS;
}
CUresult cuMemMap(CUdeviceptr address, size_t size, size_t offset,
                  CUmemGenericAllocationHandle handle, unsigned long long flags) {
    return CUDA_SUCCESS;
}
OK(cuMemUnmap, CUdeviceptr address, size_t size)
OK(cuMemRelease, CUmemGenericAllocationHandle handle)
OK(cuMemSetAccess, CUdeviceptr address, size_t size, const CUmemAccessDesc *access, size_t count)

// ---- Errors, and functions by name

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = "an error of the null driver";
    return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult error, const char **name) {
    *name = "CUDA_ERROR_OF_NULL_DRIVER";
    return CUDA_SUCCESS;
}
CUresult cuGetProcAddress_v2(const char *symbol, void **function, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult *result) {
    static const char *suffixes[] = {"_v3", "_v2", ""};
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    *function = 0;
    for (int i = 0; i < 3 && !*function; i++) {
        char name[128];
        snprintf(name, sizeof name, "%s%s", symbol, suffixes[i]);
        *function = dlsym(driver, name);
    }
    if (result)
        *result = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
CUresult cuGetProcAddress(const char *symbol, void **function, int version, cuuint64_t flags) {
    return cuGetProcAddress_v2(symbol, function, version, flags, 0);
}
CUresult cuGetExportTable(const void **table, const CUuuid *id) { return CUDA_ERROR_NOT_FOUND; }
