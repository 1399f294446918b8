// The log and the counters of a null GPU, and what its functions return when they refuse.
#include "null.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LINE 2048  // longest line of the log; names of C++ templates are long

struct null_counts null_counts;
int null_logging;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char *text;
static size_t text_used, text_room;
static __thread cudaError_t last_error;

void null_note(const char *format, ...) {
    if (!null_logging) return;
    pthread_mutex_lock(&lock);
    if (text_used + LINE + 2 > text_room) {
        text_room = text_room ? 2 * text_room : 1 << 20;
        text = realloc(text, text_room);
    }
    va_list values;
    va_start(values, format);
    int written = vsnprintf(text + text_used, LINE, format, values);
    va_end(values);
    text_used += written < LINE ? written : LINE - 1;
    text[text_used++] = '\n';
    text[text_used] = 0;
    pthread_mutex_unlock(&lock);
}

const char *null_log(void) { return text ? text : ""; }

// Empties log and counters; the log is written from now on if `on`.
void null_start(int on) {
    pthread_mutex_lock(&lock);
    text_used = 0;
    if (text) text[0] = 0;
    null_logging = on;
    memset(&null_counts, 0, sizeof null_counts);
    pthread_mutex_unlock(&lock);
}

cudaError_t null_error(cudaError_t error) { return last_error = error; }

cudaError_t null_refuse(cudaError_t error, const char *function) {
    null_note("REFUSED %s (error %d)", function, (int)error);
    return null_error(error);
}

const char *cudaGetErrorName(cudaError_t error) {
    return error ? "cudaErrorOfNullGpu" : "cudaSuccess";
}
const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "no error";
        case cudaErrorMemoryAllocation:
            return "out of memory";
        case cudaErrorStreamCaptureUnsupported:
            return "operation not permitted when stream is capturing";
        case cudaErrorStreamCaptureIsolation:
            return "dependency created on uncaptured work in another stream";
        case cudaErrorStreamCaptureImplicit:
            return "operation would make the legacy stream depend on a capturing stream";
        case cudaErrorCapturedEvent:
            return "operation not permitted on an event last recorded in a capturing stream";
        default:
            return "an error of the null GPU";
    }
}
cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}
cudaError_t cudaPeekAtLastError(void) { return last_error; }
