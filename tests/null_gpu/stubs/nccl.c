// NCCL that sends nothing: a collective is a launch on its stream, and a rank gets its own values.
#include "null.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#undef OK
#define OK(name) \
    int name(void) { return 0; }
#define CREATE(name)              \
    int name(void **created) {    \
        *created = calloc(1, 64); \
        return 0;                 \
    }

static int of_launcher(const char *variable, int otherwise) {
    const char *value = getenv(variable);
    return value ? atoi(value) : otherwise;
}

static const struct {
    const char *name;
    size_t bytes;
} types[] = {
    {"int8", 1},    {"uint8", 1},   {"int32", 4},   {"uint32", 4},   {"int64", 8},  {"uint64", 8},
    {"float16", 2}, {"float32", 4}, {"float64", 8}, {"bfloat16", 2}, {"float8", 1}, {"float8", 1},
};

// A launch, named by all that every rank must give alike. `option` is the operation of a reduction,
// or the rank that sends or receives. Returns whether values are copied now.
static int begin(const char *name, size_t count, int type, int option, cudaStream_t stream) {
    char line[96];
    snprintf(line, sizeof line, "%s of %zu %s, %d", name, count, types[type].name, option);
    null_launch(line, stream);
    return !null_capturing(stream);
}

int ncclGetVersion(int *version) {
    *version = 22907;
    return 0;
}
int ncclGetUniqueId(void *id) {
    memset(id, 7, 128);
    return 0;
}
CREATE(ncclCommInitRank)
CREATE(ncclCommInitRankConfig)
CREATE(ncclCommInitRankScalable)
int ncclCommSplit(void *parent, int color, int key, void **created) {
    *created = calloc(1, 64);
    return 0;
}
OK(ncclCommDestroy)
OK(ncclCommFinalize)
int ncclCommAbort(void *communicator) {
    null_note("REFUSED ncclCommAbort");
    return 0;
}
int ncclCommGetAsyncError(void *communicator, int *error) { return *error = 0; }
int ncclCommCount(void *communicator, int *count) {
    *count = of_launcher("WORLD_SIZE", 1);
    return 0;
}
int ncclCommUserRank(void *communicator, int *rank) {
    *rank = of_launcher("RANK", 0);
    return 0;
}
int ncclCommRegister(void *communicator, void *buffer, size_t size, void **handle) {
    *handle = 0;
    return 0;
}
OK(ncclCommDeregister)
OK(ncclGroupStart)
OK(ncclGroupEnd)
const char *ncclGetErrorString(int error) { return "an error of the null NCCL"; }
const char *ncclGetLastError(void *communicator) { return ""; }

int ncclAllReduce(const void *send, void *receive, size_t count, int type, int operation,
                  void *communicator, cudaStream_t stream) {
    begin("ncclAllReduce", count, type, operation, stream);
    return 0;
}
int ncclAllGather(const void *send, void *receive, size_t count, int type, void *communicator,
                  cudaStream_t stream) {
    size_t size = count * types[type].bytes;
    if (begin("ncclAllGather", count, type, 0, stream))
        for (int rank = 0; rank < of_launcher("WORLD_SIZE", 1); rank++)
            memmove((char *)receive + rank * size, send, size);
    return 0;
}
int ncclBroadcast(const void *send, void *receive, size_t count, int type, int root,
                  void *communicator, cudaStream_t stream) {
    if (begin("ncclBroadcast", count, type, root, stream))
        memmove(receive, send, count * types[type].bytes);
    return 0;
}
int ncclBcast(void *values, size_t count, int type, int root, void *communicator,
              cudaStream_t stream) {
    return ncclBroadcast(values, values, count, type, root, communicator, stream);
}
int ncclReduce(const void *send, void *receive, size_t count, int type, int operation, int root,
               void *communicator, cudaStream_t stream) {
    begin("ncclReduce", count, type, root, stream);
    return 0;
}
int ncclReduceScatter(const void *send, void *receive, size_t count, int type, int operation,
                      void *communicator, cudaStream_t stream) {
    begin("ncclReduceScatter", count, type, operation, stream);
    return 0;
}
int ncclSend(const void *values, size_t count, int type, int to, void *communicator,
             cudaStream_t stream) {
    begin("ncclSend", count, type, to, stream);
    return 0;
}
int ncclRecv(void *values, size_t count, int type, int from, void *communicator,
             cudaStream_t stream) {
    begin("ncclRecv", count, type, from, stream);
    return 0;
}
