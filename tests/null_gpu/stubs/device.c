// The device, an H200: its properties, and functions of the driver by name.
#define _GNU_SOURCE
#include "null.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

#define CUDA_VERSION_HERE 13020

static int device_count = 1;  // the environment variable NULL_GPUS
static __thread int current_device;

__attribute__((constructor)) static void read_environment(void) {
    const char *count = getenv("NULL_GPUS");
    if (count) device_count = atoi(count);
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = device_count;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int *device) {
    *device = current_device;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
    if (device >= device_count) return null_refuse(cudaErrorInvalidDevice, "cudaSetDevice");
    current_device = device;
    return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = 0;
    return cudaSuccess;
}
OK(cudaDeviceEnablePeerAccess, int device, unsigned flags)
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device) {
    snprintf(id, size, "0000:0%d:00.0", device);
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
    size_t free, total;
    cudaMemGetInfo(&free, &total);
    *found = (struct cudaDeviceProp){
        .name = "NVIDIA H200 (none)",
        .major = 9,
        .minor = 0,
        .totalGlobalMem = total,
        .multiProcessorCount = 132,
        .warpSize = 32,
        .maxThreadsPerBlock = 1024,
        .maxThreadsPerMultiProcessor = 2048,
        .maxBlocksPerMultiProcessor = 32,
        .maxThreadsDim = {1024, 1024, 64},
        .maxGridSize = {2147483647, 65535, 65535},
        .regsPerBlock = 65536,
        .regsPerMultiprocessor = 65536,
        .sharedMemPerBlock = 48 << 10,
        .sharedMemPerBlockOptin = 227 << 10,
        .sharedMemPerMultiprocessor = 228 << 10,
        .l2CacheSize = 60 << 20,
        .totalConstMem = 65536,
        .memoryBusWidth = 6144,
        .textureAlignment = 512,
        .concurrentKernels = 1,
        .unifiedAddressing = 1,
        .cooperativeLaunch = 1,
        .pciBusID = 1 + device,
    };
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr name, int device) {
    static const int values[256] = {
        [cudaDevAttrMaxThreadsPerBlock] = 1024,
        [cudaDevAttrMaxBlockDimX] = 1024,
        [cudaDevAttrMaxBlockDimY] = 1024,
        [cudaDevAttrMaxBlockDimZ] = 64,
        [cudaDevAttrMaxGridDimX] = 2147483647,
        [cudaDevAttrMaxGridDimY] = 65535,
        [cudaDevAttrMaxGridDimZ] = 65535,
        [cudaDevAttrMaxSharedMemoryPerBlock] = 48 << 10,
        [cudaDevAttrMaxSharedMemoryPerBlockOptin] = 227 << 10,
        [cudaDevAttrMaxSharedMemoryPerMultiprocessor] = 228 << 10,
        [cudaDevAttrReservedSharedMemoryPerBlock] = 1 << 10,
        [cudaDevAttrTotalConstantMemory] = 65536,
        [cudaDevAttrWarpSize] = 32,
        [cudaDevAttrMaxRegistersPerBlock] = 65536,
        [cudaDevAttrMaxRegistersPerMultiprocessor] = 65536,
        [cudaDevAttrClockRate] = 1980000,
        [cudaDevAttrMemoryClockRate] = 2619000,
        [cudaDevAttrMultiProcessorCount] = 132,
        [cudaDevAttrGlobalMemoryBusWidth] = 6144,
        [cudaDevAttrL2CacheSize] = 60 << 20,
        [cudaDevAttrMaxThreadsPerMultiProcessor] = 2048,
        [cudaDevAttrMaxBlocksPerMultiprocessor] = 32,
        [cudaDevAttrUnifiedAddressing] = 1,
        [cudaDevAttrComputeCapabilityMajor] = 9,
        [cudaDevAttrManagedMemory] = 1,
        [cudaDevAttrConcurrentManagedAccess] = 1,
        [cudaDevAttrCooperativeLaunch] = 1,
        [cudaDevAttrMemoryPoolsSupported] = 1,
        [120] = 1,  // clusters of thread blocks
    };
    *value = name < 256 ? values[name] : 0;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) {
    *version = CUDA_VERSION_HERE;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = CUDA_VERSION_HERE;
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *function) {
    *found = (struct cudaFuncAttributes){
        .maxThreadsPerBlock = 1024,
        .numRegs = 32,
        .binaryVersion = 90,
        .ptxVersion = 90,
        .maxDynamicSharedSizeBytes = 227 << 10,
    };
    return cudaSuccess;
}
OK(cudaFuncSetAttribute, const void *function, enum cudaFuncAttribute name, int value)
OK(cudaKernelSetAttributeForDevice, cudaKernel_t kernel, enum cudaFuncAttribute name, int value,
   int device)
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *function,
                                                          int threads, size_t shared) {
    *blocks = threads ? 2048 / threads : 1;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks,
                                                                   const void *function,
                                                                   int threads, size_t shared,
                                                                   unsigned flags) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, threads, shared);
}

OK(cudaProfilerStart, void)
OK(cudaProfilerStop, void)

// ---- The driver's functions (driver.c), and libraries of kernels

cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    *function = driver ? dlsym(driver, symbol) : 0;
    if (result)
        *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
cudaError_t cudaLibraryLoadData(cudaLibrary_t *library, const void *code,
                                enum cudaJitOption *jit_options, void **jit_values,
                                unsigned jit_count, enum cudaLibraryOption *options, void **values,
                                unsigned count) {
    *library = malloc(1);
    return cudaSuccess;
}
cudaError_t cudaLibraryLoadFromFile(cudaLibrary_t *library, const char *file,
                                    enum cudaJitOption *jit_options, void **jit_values,
                                    unsigned jit_count, enum cudaLibraryOption *options,
                                    void **values, unsigned count) {
    *library = malloc(1);
    return cudaSuccess;
}
OK(cudaLibraryUnload, cudaLibrary_t library)
