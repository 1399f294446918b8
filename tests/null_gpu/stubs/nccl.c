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

static size_t bytes_of(int type) {
    static const size_t bytes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1};
    return bytes[type];
}

static int begin(const char *name, size_t count, cudaStream_t stream) {
    char line[64];
    snprintf(line, sizeof line, "%s %zu", name, count);
    null_launch(line, stream);
    return !null_capturing(stream);  // whether values are copied now
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
    begin("ncclAllReduce", count, stream);
    return 0;
}
int ncclAllGather(const void *send, void *receive, size_t count, int type, void *communicator,
                  cudaStream_t stream) {
    size_t size = count * bytes_of(type);
    if (begin("ncclAllGather", count, stream))
        for (int rank = 0; rank < of_launcher("WORLD_SIZE", 1); rank++)
            memmove((char *)receive + rank * size, send, size);
    return 0;
}
int ncclBroadcast(const void *send, void *receive, size_t count, int type, int root,
                  void *communicator, cudaStream_t stream) {
    if (begin("ncclBroadcast", count, stream)) memmove(receive, send, count * bytes_of(type));
    return 0;
}
int ncclReduceScatter(const void *send, void *receive, size_t count, int type, int operation,
                      void *communicator, cudaStream_t stream) {
    begin("ncclReduceScatter", count, stream);
    return 0;
}
OK(ncclBcast)
OK(ncclReduce)
OK(ncclSend)
OK(ncclRecv)
