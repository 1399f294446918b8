// Functions of the driver that libraries look up when they are loaded, and do not call here. Without
// <cuda.h>, since their arguments do not matter.
#define NOT_SUPPORTED(name) \
    int name(void) { return 801; }

NOT_SUPPORTED(cuTensorMapEncodeTiled)
NOT_SUPPORTED(cuTensorMapEncodeIm2col)
NOT_SUPPORTED(cuStreamWriteValue32)
NOT_SUPPORTED(cuStreamWriteValue32_v2)
NOT_SUPPORTED(cuMemExportToShareableHandle)
NOT_SUPPORTED(cuMemImportFromShareableHandle)
NOT_SUPPORTED(cuMemRetainAllocationHandle)
NOT_SUPPORTED(cuMemGetAllocationPropertiesFromHandle)
NOT_SUPPORTED(cuMemGetAddressRange)
NOT_SUPPORTED(cuMemGetAddressRange_v2)
NOT_SUPPORTED(cuDeviceGetDevResource)
NOT_SUPPORTED(cuCtxFromGreenCtx)
NOT_SUPPORTED(cuLinkCreate_v2)
NOT_SUPPORTED(cuLinkAddData_v2)
NOT_SUPPORTED(cuLinkComplete)
