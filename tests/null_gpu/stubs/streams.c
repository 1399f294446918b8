// Streams, captures, graphs and events. What a capture forbids is refused.
#define _GNU_SOURCE
#include "null.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

typedef struct {
    long nodes;
    int ended;  // its capture
} Graph;
typedef struct {
    unsigned long long capture_id;
    Graph *graph;  // of its last capture
} Stream;

static Stream legacy_stream;
static unsigned long long last_capture_id;
static int captures;               // running; backward passes have a thread of their own
static __thread int own_captures;  // begun by this thread
static __thread enum cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

static Stream *stream_of(cudaStream_t handle) {
    int legacy = !handle || handle == cudaStreamLegacy || handle == cudaStreamPerThread;
    return legacy ? &legacy_stream : (Stream *)handle;
}

static int is_open(const Graph *graph) { return graph && !graph->ended; }

int null_capturing(cudaStream_t stream) { return is_open(stream_of(stream)->graph); }

void null_enqueue(const char *kind, const char *what, cudaStream_t handle) {
    Stream *stream = stream_of(handle);
    if (is_open(stream->graph)) stream->graph->nodes++;
    const char *where = is_open(stream->graph) ? "CAPTURED " : captures ? "ESCAPED " : "";
    null_note("%s%s %s", where, kind, what);
}

// A capture forbids calls to its thread, unless the thread has relaxed that.
static int forbids(void) { return own_captures && capture_mode != cudaStreamCaptureModeRelaxed; }

cudaError_t null_unsafe(const char *function) {
    return forbids() ? null_refuse(cudaErrorStreamCaptureUnsupported, function) : cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
    null_enqueue("HOSTFUNC", "", stream);
    if (!null_capturing(stream)) function(data);
    return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void *data,
                                  unsigned flags) {
    if (null_capturing(stream))
        return null_refuse(cudaErrorStreamCaptureUnsupported, "cudaStreamAddCallback");
    callback(stream, cudaSuccess, data);
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    *stream = (cudaStream_t)calloc(1, sizeof(Stream));
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) {
    return cudaStreamCreateWithPriority(stream, 0, 0);
}
OK(cudaStreamDestroy, cudaStream_t stream)
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = 0;
    return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    if (null_capturing(stream))
        return null_refuse(cudaErrorStreamCaptureUnsupported, "cudaStreamQuery");
    return cudaSuccess;
}

cudaError_t null_wait(const char *what, const char *function, int forbidden) {
    if (forbidden) return null_refuse(cudaErrorStreamCaptureUnsupported, function);
    null_note("SYNC %s%s", what, gettid() == getpid() ? "" : " in a thread");
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    return null_wait("stream", "cudaStreamSynchronize", null_capturing(stream));
}
cudaError_t cudaDeviceSynchronize(void) {
    return null_wait("device", "cudaDeviceSynchronize", forbids());
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = null_capturing(stream) ? cudaStreamCaptureStatusActive
                                      : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, enum cudaStreamCaptureStatus *status,
                                     unsigned long long *id, cudaGraph_t *graph,
                                     const cudaGraphNode_t **dependencies,
                                     const cudaGraphEdgeData **edges, size_t *count) {
    Stream *stream = stream_of(handle);
    if (id) *id = stream->capture_id;
    if (graph) *graph = (cudaGraph_t)stream->graph;
    if (dependencies) *dependencies = 0;
    if (edges) *edges = 0;
    if (count) *count = 0;
    return cudaStreamIsCapturing(handle, status);
}
OK(cudaStreamUpdateCaptureDependencies, cudaStream_t stream, cudaGraphNode_t *nodes,
   const cudaGraphEdgeData *edges, size_t count, unsigned flags)
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    enum cudaStreamCaptureMode before = capture_mode;
    capture_mode = *mode;
    *mode = before;
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, enum cudaStreamCaptureMode mode) {
    Stream *stream = stream_of(handle);
    if (stream == &legacy_stream)
        return null_refuse(cudaErrorStreamCaptureUnsupported, "cudaStreamBeginCapture");
    *stream = (Stream){++last_capture_id, calloc(1, sizeof(Graph))};
    captures++;
    own_captures++;
    null_note("CAPTURE begins");
    return cudaSuccess;
}
cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t graph,
                                          const cudaGraphNode_t *nodes,
                                          const cudaGraphEdgeData *edges, size_t count,
                                          enum cudaStreamCaptureMode mode) {
    return cudaStreamBeginCapture(stream, mode);
}
cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *graph) {
    Stream *stream = stream_of(handle);
    stream->graph->ended = 1;
    captures--;
    own_captures--;
    *graph = (cudaGraph_t)stream->graph;
    null_note("CAPTURE ends, %ld nodes", stream->graph->nodes);
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *instance, cudaGraph_t graph,
                                 unsigned long long flags) {
    *instance = (cudaGraphExec_t)graph;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *instance, cudaGraph_t graph,
                                          unsigned long long flags) {
    return cudaGraphInstantiate(instance, graph, flags);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t instance, cudaStream_t stream) {
    null_counts.graph_launches++;
    null_note("GRAPH of %ld nodes", ((Graph *)instance)->nodes);
    return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    if (!nodes) *count = ((Graph *)graph)->nodes;
    return cudaSuccess;
}
cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t node, cudaGraphNode_t *dependencies,
                                         cudaGraphEdgeData *edges, size_t *count) {
    *count = 0;
    return cudaSuccess;
}
// Graphs are not freed: an instance is its graph, and a process makes a few.
OK(cudaGraphDestroy, cudaGraph_t graph)
OK(cudaGraphExecDestroy, cudaGraphExec_t instance)
OK(cudaGraphAddNode, cudaGraphNode_t *node, cudaGraph_t graph, const cudaGraphNode_t *dependencies,
   const cudaGraphEdgeData *edges, size_t count, struct cudaGraphNodeParams *parameters)
OK(cudaGraphConditionalHandleCreate, cudaGraphConditionalHandle *handle, cudaGraph_t graph,
   unsigned launch_value, unsigned flags)
OK(cudaGraphRetainUserObject, cudaGraph_t graph, cudaUserObject_t object, unsigned count,
   unsigned flags)
cudaError_t cudaUserObjectCreate(cudaUserObject_t *object, void *data, cudaHostFn_t destroy,
                                 unsigned references, unsigned flags) {
    *object = malloc(1);
    return cudaSuccess;
}
OK(cudaUserObjectRelease, cudaUserObject_t object, unsigned count)

// ---- Events

typedef struct {
    Graph *graph;  // of the capture in which it was recorded
    unsigned long long capture_id;
    double milliseconds;
    int device;
} Event;

static int is_captured(cudaEvent_t event) { return is_open(((Event *)event)->graph); }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = (cudaEvent_t)calloc(1, sizeof(Event));
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
    Event *event = (Event *)handle;
    Stream *stream = stream_of(stream_handle);
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    event->graph = is_open(stream->graph) ? stream->graph : 0;
    event->capture_id = stream->capture_id;
    cudaGetDevice(&event->device);
    event->milliseconds = now.tv_sec * 1e3 + now.tv_nsec * 1e-6;
    return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    return cudaEventRecord(event, stream);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
    if (is_captured(event)) return null_refuse(cudaErrorCapturedEvent, "cudaEventQuery");
    return null_unsafe("cudaEventQuery");
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    if (is_captured(event)) return null_refuse(cudaErrorCapturedEvent, "cudaEventSynchronize");
    int device;
    cudaGetDevice(&device);
    // Legal, but a thread that has not set its device makes a context on the first one.
    int own = device == ((Event *)event)->device;
    return null_wait(own ? "event" : "event of another device", "cudaEventSynchronize", 0);
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    *milliseconds = ((Event *)end)->milliseconds - ((Event *)start)->milliseconds;
    if (*milliseconds < 0.001f) *milliseconds = 0.001f;  // nobody divides by zero
    return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned flags) {
    Event *event = (Event *)event_handle;
    Stream *stream = stream_of(handle);
    if (is_captured(event_handle)) {
        if (stream == &legacy_stream)
            return null_refuse(cudaErrorStreamCaptureImplicit, "cudaStreamWaitEvent");
        if (!is_open(stream->graph)) {
            *stream = (Stream){event->capture_id, event->graph};
            null_note("JOINED a stream to the capture");
        }
    } else if (is_open(stream->graph)) {
        return null_refuse(cudaErrorStreamCaptureIsolation, "cudaStreamWaitEvent");
    }
    return cudaSuccess;
}
