// The driver (libcuda.so.1), as far as torch's loader, Triton's launcher and Transformer Engine ask for it. Kernels that
// Triton has compiled are known by their names and not loaded.
#include <cuda.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "device.h"

using namespace emulator;

static CUcontext context() {
    static int one;
    return (CUcontext)&one;
}
template <class T>
static CUresult answer(T* place, T value) {
    if (place) *place = value;
    return CUDA_SUCCESS;
}
static CUmodule module() { return (CUmodule)malloc(16); }

extern "C" {

int emulator_attribute(int attribute);  // runtime.cpp: the numbers of both interfaces are the same

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return answer(version, DRIVER_VERSION); }
CUresult cuDeviceGetCount(int* count) {
    const char* visible = getenv("CUDA_VISIBLE_DEVICES");
    const char* wanted = getenv("EMULATOR_DEVICES");
    return answer(count, visible && !*visible ? 0 : wanted ? atoi(wanted) : 1);
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return answer(device, ordinal); }
CUresult cuDeviceGetName(char* text, int size, CUdevice) {
    snprintf(text, size, "%s", NAME);
    return CUDA_SUCCESS;
}
CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice) { return answer(bytes, MEMORY); }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
    return answer(value, emulator_attribute(attribute));
}
CUresult cuCtxGetCurrent(CUcontext* c) { return answer(c, context()); }
CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxPushCurrent_v2(CUcontext) { return CUDA_SUCCESS; }
CUresult cuCtxPopCurrent_v2(CUcontext* c) { return answer(c, context()); }
CUresult cuCtxGetDevice(CUdevice* device) { return answer(device, 0); }
CUresult cuCtxGetLimit(size_t* value, CUlimit) { return answer(value, size_t(1) << 20); }
CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice) { return answer(c, context()); }
CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
    answer(flags, 0u);
    return answer(active, 1);
}
CUresult cuCtxSynchronize() {
    emulator_log("S cuCtxSynchronize");
    return CUDA_SUCCESS;
}
CUresult cuStreamSynchronize(CUstream) {
    emulator_log("S cuStreamSynchronize");
    return CUDA_SUCCESS;
}
CUresult cuStreamGetCtx(CUstream, CUcontext* c) { return answer(c, context()); }

CUresult cuModuleLoad(CUmodule* m, const char*) { return answer(m, module()); }
CUresult cuModuleLoadData(CUmodule* m, const void*) { return answer(m, module()); }
CUresult cuModuleLoadDataEx(CUmodule* m, const void*, unsigned, CUjit_option*, void**) { return answer(m, module()); }
CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
    return answer(function, (CUfunction)strdup(name));
}
CUresult cuModuleGetGlobal_v2(CUdeviceptr* p, size_t* bytes, CUmodule, const char*) {
    answer(bytes, size_t(1) << 16);
    return answer(p, (CUdeviceptr)malloc(1 << 16));
}
CUresult cuLibraryLoadData(CUlibrary* library, const void*, CUjit_option*, void**, unsigned, CUlibraryOption*, void**,
                           unsigned) {
    return answer(library, (CUlibrary)module());
}
CUresult cuLibraryUnload(CUlibrary) { return CUDA_SUCCESS; }
CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary, const char* name) {
    return answer(kernel, (CUkernel)strdup(name));
}
CUresult cuKernelGetFunction(CUfunction* function, CUkernel kernel) { return answer(function, (CUfunction)kernel); }
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
    bool registers = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS, threads = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK;
    return answer(value, registers ? 128 : threads ? 1024 : 0);
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* count, CUfunction, int, size_t) { return answer(count, 2); }
CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction, const CUlaunchConfig*) { return answer(count, 32); }
CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr p) {
    switch (attribute) {
        case CU_POINTER_ATTRIBUTE_MEMORY_TYPE: *(int*)value = CU_MEMORYTYPE_DEVICE; break;
        case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *(CUdeviceptr*)value = p; break;
        default: *(int*)value = 0;
    }
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream stream, void**, void**) {
    emulator_launch(stream, "L %s %u,%u,%u %u %u", (const char*)f, gx, gy, gz, bx * by * bz, shared);
    return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void**, void**) {
    return cuLaunchKernel(f, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ,
                          c->sharedMemBytes, c->hStream, nullptr, nullptr);
}

CUresult cuGetErrorString(CUresult, const char** text) { return answer(text, "error of the emulated device"); }
CUresult cuGetErrorName(CUresult, const char** text) { return answer(text, "emulated"); }
CUresult cuGetProcAddress_v2(const char* name, void** function, int, cuuint64_t, CUdriverProcAddressQueryResult* result) {
    static void* self = dlopen("libcuda.so.1", RTLD_NOW);
    *function = dlsym(self, name);
    answer(result, *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND);
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

}  // extern "C"
