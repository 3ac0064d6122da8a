// cuBLAS and cuBLASLt: products are logged with their shapes and types, and not carried out. Descriptors stay the real
// library's, which needs no device for them; it tells the shapes of a cublasLtMatmul.
#include <cublasLt.h>
#include <cublas_v2.h>
#include <dlfcn.h>

#include <cstring>

#include "device.h"

using namespace emulator;

namespace {

struct Handle {
    cublasMath_t math = CUBLAS_DEFAULT_MATH;
    cublasPointerMode_t pointers = CUBLAS_POINTER_MODE_HOST;
    cudaStream_t stream = nullptr;
};
Handle& of(cublasHandle_t handle) { return *(Handle*)handle; }

cublasStatus_t product(cublasHandle_t handle, const char* name, int m, int n, int k, int count, int type, int result) {
    emulator_launch(of(handle).stream, "P %s %dx%dx%d*%d types %d>%d", name, m, n, k, count, type, result);
    return CUBLAS_STATUS_SUCCESS;
}

// A function of the real cublasLt, which torch has loaded out of this library's sight.
template <class F>
F* real(const char* name) {
    static void* library = dlopen("libcublasLt.so.13", RTLD_NOW | RTLD_NOLOAD);
    return (F*)dlsym(library, name);
}
#define REAL(f) real<decltype(f)>(#f)

struct Shape {
    unsigned long long rows = 0, columns = 0;
    int type = -1;
};
Shape shape(cublasLtMatrixLayout_t layout) {
    static auto* get = REAL(cublasLtMatrixLayoutGetAttribute);
    Shape s;
    size_t written;
    get(layout, CUBLASLT_MATRIX_LAYOUT_ROWS, &s.rows, sizeof s.rows, &written);
    get(layout, CUBLASLT_MATRIX_LAYOUT_COLS, &s.columns, sizeof s.columns, &written);
    get(layout, CUBLASLT_MATRIX_LAYOUT_TYPE, &s.type, sizeof s.type, &written);
    return s;
}

}  // namespace

extern "C" {

cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) {
    *handle = (cublasHandle_t) new Handle;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) {
    delete (Handle*)handle;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
    of(handle).stream = stream;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t, void*, size_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) {
    of(handle).math = mode;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t* mode) {
    *mode = of(handle).math;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t mode) {
    of(handle).pointers = mode;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t* mode) {
    *mode = of(handle).pointers;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGemmEx(cublasHandle_t h, cublasOperation_t, cublasOperation_t, int m, int n, int k, const void*,
                            const void*, cudaDataType a, int, const void*, cudaDataType, int, const void*, void*,
                            cudaDataType c, int, cublasComputeType_t, cublasGemmAlgo_t) {
    return product(h, "gemmEx", m, n, k, 1, a, c);
}
cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t h, cublasOperation_t, cublasOperation_t, int m, int n, int k,
                                          const void*, const void*, cudaDataType a, int, long long, const void*,
                                          cudaDataType, int, long long, const void*, void*, cudaDataType c, int,
                                          long long, int count, cublasComputeType_t, cublasGemmAlgo_t) {
    return product(h, "gemmStridedBatchedEx", m, n, k, count, a, c);
}
cublasStatus_t cublasSgemm_v2(cublasHandle_t h, cublasOperation_t, cublasOperation_t, int m, int n, int k, const float*,
                              const float*, int, const float*, int, const float*, float*, int) {
    return product(h, "sgemm", m, n, k, 1, CUDA_R_32F, CUDA_R_32F);
}
cublasStatus_t cublasSgemmEx(cublasHandle_t h, cublasOperation_t, cublasOperation_t, int m, int n, int k, const float*,
                             const void*, cudaDataType a, int, const void*, cudaDataType, int, const float*, void*,
                             cudaDataType c, int) {
    return product(h, "sgemmEx", m, n, k, 1, a, c);
}
cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t h, cublasOperation_t, cublasOperation_t, int m, int n, int k,
                                         const float*, const float*, int, long long, const float*, int, long long,
                                         const float*, float*, int, long long, int count) {
    return product(h, "sgemmStridedBatched", m, n, k, count, CUDA_R_32F, CUDA_R_32F);
}
cublasStatus_t cublasSgemv_v2(cublasHandle_t h, cublasOperation_t, int m, int n, const float*, const float*, int,
                              const float*, int, const float*, float*, int) {
    return product(h, "sgemv", m, 1, n, 1, CUDA_R_32F, CUDA_R_32F);
}
cublasStatus_t cublasSdot_v2(cublasHandle_t h, int n, const float*, int, const float*, int, float*) {
    return product(h, "sdot", 1, 1, n, 1, CUDA_R_32F, CUDA_R_32F);
}
cublasStatus_t cublasDotEx(cublasHandle_t h, int n, const void*, cudaDataType a, int, const void*, cudaDataType, int,
                           void*, cudaDataType c, cudaDataType) {
    return product(h, "dotEx", 1, 1, n, 1, a, c);
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
    *handle = (cublasLtHandle_t) new Handle;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t, int, cublasLtMatmulHeuristicResult_t* found,
                                              int* count) {
    memset(found, 0, sizeof *found);
    found->state = CUBLAS_STATUS_SUCCESS, found->wavesCount = 1, *count = 1;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t description, const void*, const void*,
                              cublasLtMatrixLayout_t A, const void*, cublasLtMatrixLayout_t B, const void*, const void*,
                              cublasLtMatrixLayout_t, void*, cublasLtMatrixLayout_t D, const cublasLtMatmulAlgo_t*,
                              void*, size_t, cudaStream_t stream) {
    Shape a = shape(A), b = shape(B), d = shape(D);
    int epilogue = 0;
    size_t written;
    static auto* get = REAL(cublasLtMatmulDescGetAttribute);
    get(description, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue, &written);
    unsigned long long k = d.rows && d.columns ? a.rows * a.columns / d.rows : 0;
    emulator_launch(stream, "P ltMatmul %llux%llux%llu*1 types %d,%d>%d epilogue %d", d.rows, d.columns, k, a.type,
                    b.type, d.type, epilogue);
    return CUBLAS_STATUS_SUCCESS;
}

}  // extern "C"
