// Memory: that of the device is the host's. Copies are done unless both ends are on the device.
#define _GNU_SOURCE
#include "null.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static size_t device_memory = 139ull << 30;  // the environment variable NULL_GB

__attribute__((constructor)) static void read_environment(void) {
    const char *gib = getenv("NULL_GB");
    if (gib) device_memory = (size_t)(atof(gib) * (1ull << 30));
}

enum { PAGEABLE, PINNED, DEVICE };
typedef struct {
    char *start;
    size_t size;
    int kind;
} Block;
static Block *blocks;
static size_t block_count, block_room, device_bytes;

static void *take(size_t size, int kind) {
    if (!size) size = 1;
    char *start = mmap(0, size, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return 0;
    pthread_mutex_lock(&lock);
    if (block_count == block_room) {
        block_room = block_room ? 2 * block_room : 1024;
        blocks = realloc(blocks, block_room * sizeof(Block));
    }
    blocks[block_count++] = (Block){start, size, kind};
    if (kind == DEVICE) device_bytes += size;
    pthread_mutex_unlock(&lock);
    return start;
}

static void give_back(void *start) {
    pthread_mutex_lock(&lock);
    for (size_t i = 0; start && i < block_count; i++) {
        if (blocks[i].start != start) continue;
        if (blocks[i].kind == DEVICE) device_bytes -= blocks[i].size;
        munmap(start, blocks[i].size);
        blocks[i] = blocks[--block_count];
        break;
    }
    pthread_mutex_unlock(&lock);
}

static int kind_of(const void *address) {
    int kind = PAGEABLE;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < block_count; i++) {
        size_t offset = (const char *)address - blocks[i].start;  // wraps below the start
        if (offset < blocks[i].size) kind = blocks[i].kind;
    }
    pthread_mutex_unlock(&lock);
    return kind;
}

cudaError_t cudaMalloc(void **address, size_t size) {
    cudaError_t error = null_unsafe("cudaMalloc");
    if (error) return error;
    *address = device_bytes + size > device_memory ? 0 : take(size, DEVICE);
    return null_error(*address ? cudaSuccess : cudaErrorMemoryAllocation);
}
cudaError_t cudaMallocAsync(void **address, size_t size, cudaStream_t stream) {
    return cudaMalloc(address, size);
}
cudaError_t cudaMallocManaged(void **address, size_t size, unsigned flags) {
    return cudaMalloc(address, size);
}
cudaError_t cudaFree(void *address) {
    cudaError_t error = null_unsafe("cudaFree");
    if (!error) give_back(address);
    return error;
}
cudaError_t cudaFreeAsync(void *address, cudaStream_t stream) {
    give_back(address);
    return cudaSuccess;
}
cudaError_t cudaHostAlloc(void **address, size_t size, unsigned flags) {
    cudaError_t error = null_unsafe("cudaHostAlloc");
    if (error) return error;
    *address = take(size, PINNED);
    null_note("HOSTALLOC %zu bytes", size);
    return cudaSuccess;
}
cudaError_t cudaMallocHost(void **address, size_t size) { return cudaHostAlloc(address, size, 0); }
cudaError_t cudaFreeHost(void *address) {
    give_back(address);
    return cudaSuccess;
}
OK(cudaHostRegister, void *address, size_t size, unsigned flags)
OK(cudaHostUnregister, void *address)
cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    *total = device_memory;
    *free = device_memory - device_bytes;
    return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes,
                                     const void *address) {
    static const enum cudaMemoryType types[] = {
        [PAGEABLE] = cudaMemoryTypeUnregistered,
        [PINNED] = cudaMemoryTypeHost,
        [DEVICE] = cudaMemoryTypeDevice,
    };
    int kind = kind_of(address);
    memset(attributes, 0, sizeof *attributes);
    attributes->type = types[kind];
    attributes->devicePointer = kind == PAGEABLE ? 0 : (void *)address;
    attributes->hostPointer = kind == PINNED ? (void *)address : 0;
    return cudaSuccess;
}

static void note_copy(const void *to, const void *from, size_t size, cudaStream_t stream) {
    static const char *names[] = {"pageable", "pinned", "device"};
    char line[128];
    if (!null_logging) return;
    snprintf(line, sizeof line, "%s->%s %zu bytes from %p", names[kind_of(from)],
             names[kind_of(to)], size, from);
    null_enqueue("MEMCPY", line, stream);
}
// Device memory holds no values, so copies within it are only counted.
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind,
                            cudaStream_t stream) {
    note_copy(to, from, size, stream);
    if (!null_capturing(stream) && kind != cudaMemcpyDeviceToDevice) memcpy(to, from, size);
    return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                              size_t width, size_t height, enum cudaMemcpyKind kind,
                              cudaStream_t stream) {
    note_copy(to, from, width * height, stream);
    return cudaSuccess;
}
cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device,
                                size_t size, cudaStream_t stream) {
    note_copy(to, from, size, stream);
    return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    cudaError_t error = null_unsafe("cudaMemcpy");
    if (error) return error;
    note_copy(to, from, size, 0);
    memcpy(to, from, size);
    return null_wait("cudaMemcpy", "cudaMemcpy", 0);
}
OK(cudaMemcpyToSymbol, const void *symbol, const void *from, size_t size, size_t offset,
   enum cudaMemcpyKind kind)
cudaError_t cudaMemset(void *address, int value, size_t size) {
    memset(address, value, size);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *address, int value, size_t size, cudaStream_t stream) {
    char line[32];
    snprintf(line, sizeof line, "%zu bytes", size);
    null_enqueue("MEMSET", line, stream);
    // Large blocks stay untouched, so that they take no memory of the host.
    if (!null_capturing(stream) && size < 1 << 20) memset(address, value, size);
    return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
    static char anything[4096];
    *address = anything;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) {
    *pool = (cudaMemPool_t)8;
    return cudaSuccess;
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr name, void *value) {
    *(size_t *)value = 0;
    return cudaSuccess;
}
OK(cudaMemPoolSetAttribute, cudaMemPool_t pool, enum cudaMemPoolAttr name, void *value)
OK(cudaMemPoolSetAccess, cudaMemPool_t pool, const struct cudaMemAccessDesc *access, size_t count)
OK(cudaMemPoolTrimTo, cudaMemPool_t pool, size_t bytes)
cudaError_t cudaDeviceGetGraphMemAttribute(int device, enum cudaGraphMemAttributeType name,
                                           void *value) {
    *(size_t *)value = 0;
    return cudaSuccess;
}
OK(cudaDeviceSetGraphMemAttribute, int device, enum cudaGraphMemAttributeType name, void *value)
cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *handle, void *address) {
    memset(handle, 0, sizeof *handle);
    return cudaSuccess;
}
OK(cudaIpcCloseMemHandle, void *address)
UNSUPPORTED(cudaIpcOpenMemHandle, void **address, cudaIpcMemHandle_t handle, unsigned flags)
UNSUPPORTED(cudaIpcGetEventHandle, cudaIpcEventHandle_t *handle, cudaEvent_t event)
UNSUPPORTED(cudaIpcOpenEventHandle, cudaEvent_t *event, cudaIpcEventHandle_t handle)
