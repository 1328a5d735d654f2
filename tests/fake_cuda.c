// A CUDA driver without a GPU: takes everything, runs nothing, and notes what was loaded and launched.
//
// Built as libcuda.so.1, it stands in for the real one where it comes first in LD_LIBRARY_PATH. It has what Triton's
// driver and csrc/cuda_driver.cpp call. Launches are noted with the bytes of their arguments, whose sizes it reads from
// the kernel's code, as the real driver does. FAKE_CUDA_QUIET=1 notes nothing, which leaves the cost of a launch that
// of its caller. FAKE_CUDA_CAPABILITY (90) is what every one of FAKE_CUDA_DEVICES (1) devices passes for.
#include <elf.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_IMAGE = 200, NOT_FOUND = 500 };
enum { MAX_PARAMETERS = 128 };

typedef struct Module {
  char* image;
  size_t size;
} Module;

typedef struct {
  char name[256];
  int n_parameters, sizes[MAX_PARAMETERS];
} Function;

typedef struct {  // CUlaunchConfig
  unsigned grid[3], block[3], shared;
  void* stream;
  void* attributes;
  unsigned n_attributes;
} Configuration;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char* notes;
static size_t n_notes, capacity;
static char failing[64];
static int failure;
static __thread void* context;
static __thread int capture_mode;

static int setting(const char* name, int otherwise) {
  const char* value = getenv(name);
  return value == NULL ? otherwise : atoi(value);
}

static int quiet(void) {
  static int known = -1;
  if (known < 0) known = setting("FAKE_CUDA_QUIET", 0);
  return known;
}

static void note(const char* format, ...) {
  if (quiet()) return;
  char line[4096];
  va_list values;
  va_start(values, format);
  vsnprintf(line, sizeof line, format, values);
  va_end(values);
  pthread_mutex_lock(&lock);
  const size_t length = strlen(line);
  if (n_notes + length + 2 > capacity) notes = realloc(notes, capacity = 2 * (n_notes + length + 2));
  memcpy(notes + n_notes, line, length);
  n_notes += length;
  notes[n_notes++] = '\n';
  notes[n_notes] = 0;
  pthread_mutex_unlock(&lock);
}

// What was noted, one event a line, and forgotten by that.
const char* fake_cuda_notes(void) {
  static char* handed;
  pthread_mutex_lock(&lock);
  free(handed);
  handed = notes == NULL ? calloc(1, 1) : notes;
  notes = NULL;
  n_notes = capacity = 0;
  pthread_mutex_unlock(&lock);
  return handed;
}

// Lets a function fail with an error, until another one is named.
void fake_cuda_fail(const char* function, int result) {
  snprintf(failing, sizeof failing, "%s", function);
  failure = result;
}

#define MAY_FAIL \
  if (failure && !strcmp(failing, __func__)) return failure

int cuInit(unsigned flags) {
  (void)flags;
  MAY_FAIL;
  return SUCCESS;
}

int cuDriverGetVersion(int* version) {
  *version = 13000;
  return SUCCESS;
}

int cuDeviceGetCount(int* count) {
  *count = setting("FAKE_CUDA_DEVICES", 1);
  return SUCCESS;
}

int cuDeviceGet(int* device, int ordinal) {
  if (ordinal < 0 || ordinal >= setting("FAKE_CUDA_DEVICES", 1)) return INVALID_VALUE;
  *device = ordinal;
  return SUCCESS;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  const int capability = setting("FAKE_CUDA_CAPABILITY", 90);
  switch (attribute) {
    case 75:
      *value = capability / 10;
      break;
    case 76:
      *value = capability % 10;
      break;
    case 16:
      *value = 132;
      break;  // multiprocessors
    case 81:
    case 97:
      *value = 227 << 10;
      break;  // shared memory
    default:
      *value = 1024;
  }
  return SUCCESS;
}

int cuDevicePrimaryCtxRetain(void** found, int device) {
  note("retain %d", device);
  *found = (void*)(intptr_t)(device + 1);
  return SUCCESS;
}

int cuCtxGetCurrent(void** found) {
  *found = context;
  return SUCCESS;
}

int cuCtxSetCurrent(void* chosen) {
  context = chosen;
  return SUCCESS;
}

int cuCtxGetDevice(int* device) {
  *device = (int)(intptr_t)context - 1;
  return SUCCESS;
}

int cuCtxSetLimit(int limit, size_t value) { return (void)limit, (void)value, SUCCESS; }
int cuCtxGetLimit(size_t* value, int limit) { return (void)limit, *value = 0, SUCCESS; }

int cuGetErrorString(int result, const char** text) {
  *text = result == INVALID_IMAGE ? "device kernel image is invalid" : "an error for a test";
  return SUCCESS;
}

int cuPointerGetAttribute(void* value, int attribute, uint64_t pointer) {
  (void)attribute;
  *(uint64_t*)value = pointer;
  return SUCCESS;
}

int cuPointerGetAttributes(unsigned n, int* attributes, void** values, uint64_t pointer) {
  return (void)n, (void)attributes, (void)values, (void)pointer, SUCCESS;
}

static const Elf64_Shdr* sections(const char* image, int* count) {
  const Elf64_Ehdr* header = (const Elf64_Ehdr*)image;
  *count = header->e_shnum;
  return (const Elf64_Shdr*)(image + header->e_shoff);
}

int cuModuleLoadData(void** module, const void* image) {
  MAY_FAIL;
  if (memcmp(image, ELFMAG, SELFMAG) != 0) return INVALID_IMAGE;
  int count;
  const Elf64_Shdr* section = sections(image, &count);
  size_t size = ((const Elf64_Ehdr*)image)->e_shoff + count * sizeof *section;
  uint32_t sum = 5381;
  for (int i = 0; i < count; ++i) {
    const size_t end = section[i].sh_type == SHT_NOBITS ? 0 : section[i].sh_offset + section[i].sh_size;
    if (end > size) size = end;
  }
  for (size_t i = 0; i < size; ++i) sum = 33 * sum ^ ((const unsigned char*)image)[i];
  Module* loaded = malloc(sizeof *loaded);
  loaded->image = memcpy(malloc(size), image, size);
  loaded->size = size;
  note("load %08x context %d capture_mode %d", sum, (int)(intptr_t)context, capture_mode);
  *module = loaded;
  return SUCCESS;
}

int cuModuleUnload(void* module) {
  note("unload");
  free(((Module*)module)->image);
  free(module);
  return SUCCESS;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  MAY_FAIL;
  const char* image = ((Module*)module)->image;
  int count;
  const Elf64_Shdr* section = sections(image, &count);
  const char* names = image + section[((const Elf64_Ehdr*)image)->e_shstrndx].sh_offset;
  char wanted[300];
  snprintf(wanted, sizeof wanted, ".nv.info.%s", name);
  for (int i = 0; i < count; ++i) {
    if (strcmp(names + section[i].sh_name, wanted) != 0) continue;
    Function* found = calloc(1, sizeof *found);
    snprintf(found->name, sizeof found->name, "%s", name);
    const unsigned char* at = (const unsigned char*)image + section[i].sh_offset;
    const unsigned char* end = at + section[i].sh_size;
    while (at + 4 <= end) {  // attributes: format, kind, and a length or a value
      const int has_length = at[0] == 4, kind = at[1], length = has_length ? at[2] | at[3] << 8 : 0;
      if (has_length && kind == 0x17) {  // a parameter: index, ordinal and offset, flags with the size on top
        uint16_t ordinal;
        uint32_t flags;
        memcpy(&ordinal, at + 8, 2);
        memcpy(&flags, at + 12, 4);
        if (ordinal >= MAX_PARAMETERS) return INVALID_VALUE;
        found->sizes[ordinal] = (int)(flags >> 18);
        if (ordinal >= found->n_parameters) found->n_parameters = ordinal + 1;
      }
      at += 4 + length;
    }
    *function = found;
    return SUCCESS;
  }
  return NOT_FOUND;
}

int cuFuncGetAttribute(int* value, int attribute, void* function) {
  (void)function;
  *value = attribute == 0 ? 1024 : attribute == 4 ? 64 : 0;
  return SUCCESS;
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
  note("attribute %s %d %d", ((Function*)function)->name, attribute, value);
  return attribute == 8 ? SUCCESS : INVALID_VALUE;
}

int cuFuncSetCacheConfig(void* function, int config) { return (void)function, (void)config, SUCCESS; }

int cuThreadExchangeStreamCaptureMode(int* mode) {
  const int before = capture_mode;
  capture_mode = *mode;
  *mode = before;
  return SUCCESS;
}

int cuStreamIsCapturing(void* stream, int* status) { return (void)stream, *status = 0, SUCCESS; }

static void note_launch(const Function* function, const unsigned* grid, const unsigned* block, unsigned shared,
                        void* stream, void** parameters) {
  char bytes[2048];
  size_t n = 0;
  for (int i = 0; i < function->n_parameters && n + 40 < sizeof bytes; ++i) {
    const unsigned char* value = parameters[i];
    bytes[n++] = ' ';
    for (int byte = 0; byte < function->sizes[i]; ++byte) n += (size_t)sprintf(bytes + n, "%02x", value[byte]);
  }
  bytes[n] = 0;
  note("launch %s grid %u,%u,%u block %u,%u,%u shared %u stream %p context %d args%s", function->name, grid[0], grid[1],
       grid[2], block[0], block[1], block[2], shared, stream, (int)(intptr_t)context, bytes);
}

int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  (void)extra;
  MAY_FAIL;
  const unsigned grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
  if (!quiet()) note_launch(function, grid, block, shared, stream, parameters);
  return SUCCESS;
}

int cuLaunchKernelEx(const Configuration* configuration, void* function, void** parameters, void** extra) {
  (void)extra;
  if (configuration->n_attributes != 0) note("attributes %u", configuration->n_attributes);
  if (!quiet()) {
    note_launch(function, configuration->grid, configuration->block, configuration->shared, configuration->stream,
                parameters);
  }
  return SUCCESS;
}

int cuOccupancyMaxActiveClusters(int* n, void* f, void* c) { return (void)n, (void)f, (void)c, INVALID_VALUE; }
int cuTensorMapEncodeTiled(void) { return INVALID_VALUE; }
int cuTensorMapEncodeIm2col(void) { return INVALID_VALUE; }
