// cuBLAS: every product is a launch. Only the arguments that are used are declared.
#include "null.h"

#include <stdlib.h>

static __thread cudaStream_t stream;

#undef OK
#define OK(name) \
    int name(void) { return 0; }
#define PRODUCT(name)              \
    int name(void) {               \
        null_launch(#name, stream); \
        return 0;                  \
    }
#define CREATE(name)             \
    int name(void **created) {   \
        *created = calloc(1, 1024); \
        return 0;                \
    }

CREATE(cublasCreate_v2)
OK(cublasDestroy_v2)
OK(cublasSetWorkspace_v2)
OK(cublasSetMathMode)
OK(cublasSetPointerMode_v2)
OK(cublasSetSmCountTarget)
int cublasSetStream_v2(void *handle, cudaStream_t given) {
    stream = given;
    return 0;
}
int cublasGetMathMode(void *handle, int *mode) { return *mode = 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { return *mode = 0; }

PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasDgemmStridedBatched)
PRODUCT(cublasDgemv_v2)
PRODUCT(cublasDdot_v2)
PRODUCT(cublasDotEx)
PRODUCT(cublasGemmEx)
PRODUCT(cublasGemmStridedBatchedEx)

size_t cublasLtGetVersion(void) { return 130200; }
CREATE(cublasLtMatmulDescCreate)
CREATE(cublasLtMatmulPreferenceCreate)
CREATE(cublasLtMatrixLayoutCreate)
OK(cublasLtMatmulDescDestroy)
OK(cublasLtMatmulDescSetAttribute)
OK(cublasLtMatmulPreferenceDestroy)
OK(cublasLtMatmulPreferenceSetAttribute)
OK(cublasLtMatrixLayoutDestroy)
OK(cublasLtMatrixLayoutSetAttribute)
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *product, void *a, void *b, void *c, void *d,
                                   void *preference, int wanted, void *results, int *found) {
    *found = 1;
    return 0;
}
int cublasLtMatmul(void *handle, void *product, const void *alpha, const void *a, void *a_layout,
                   const void *b, void *b_layout, const void *beta, const void *c, void *c_layout,
                   void *d, void *d_layout, void *algorithm, void *workspace, size_t size,
                   cudaStream_t given) {
    null_launch("cublasLtMatmul", given);
    return 0;
}
