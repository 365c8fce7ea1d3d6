// Lets one call of the operating system fail, for programs that are started with this library in
// LD_PRELOAD. scripts/torture/errors/failing_calls.py compiles it, and says what is to fail.
//
// The settings lie in a file that FAILING_CALLS names and all processes map. They hold what is to
// fail, and count the calls of every kind on paths below a folder, over all processes and threads.

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

// In the order of KINDS in failing_calls.py.
enum kind { OPEN, READ, MMAP, FSYNC, FCHMOD, FLOCK, RENAME, LINK, UNLINK, STATVFS, SHM, KINDS };

#define LONGEST 2048
#define SHARED_MEMORY "/dev/shm/"

struct settings {
  int32_t kind;     // of the call that fails; -1 for none
  int32_t error;    // its errno
  int32_t number;   // which one fails, from 1
  int32_t lasting;  // whether later ones of its kind on the same path fail too
  int32_t refused;  // how many have failed
  int32_t counts[KINDS];
  char root[LONGEST];  // only paths below this folder count
  char path[LONGEST];  // path of the first that failed
};

static struct settings *settings;

// Maps the settings in a file; a forked process calls this to have settings of its own.
void failing_calls_use(const char *path) {
  int file = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC);
  if (file < 0) return;
  void *found = (void *)syscall(SYS_mmap, NULL, sizeof *settings, PROT_READ | PROT_WRITE,
                                MAP_SHARED, file, 0L);
  syscall(SYS_close, file);
  if (found != MAP_FAILED) settings = found;
}

__attribute__((constructor)) static void begin(void) {
  const char *path = getenv("FAILING_CALLS");
  if (path) failing_calls_use(path);
}

static int is_below(const char *path, const char *folder) {
  size_t length = strlen(folder);
  return length && !strncmp(path, folder, length);
}

// The path that a descriptor leads to.
static void path_of(int file, char *path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, LONGEST - 1);
  path[length > 0 ? length : 0] = 0;
}

static void absolute(int folder, const char *name, char *path) {
  path[0] = 0;
  if (name[0] != '/') {
    if (folder == AT_FDCWD) {
      if (syscall(SYS_getcwd, path, LONGEST) < 0) path[0] = 0;
    } else {
      path_of(folder, path);
    }
    strncat(path, "/", LONGEST - 1 - strlen(path));
  }
  strncat(path, name, LONGEST - 1 - strlen(path));
}

// Counts a call; whether it fails. errno is then set, and otherwise as it was.
static int fails(enum kind kind, const char *path) {
  struct settings *now = settings;
  if (!now || !path[0]) return 0;
  if (kind == OPEN && is_below(path, SHARED_MEMORY)) kind = SHM;
  if (!is_below(path, kind == SHM ? SHARED_MEMORY : now->root)) return 0;
  int number = __atomic_add_fetch(&now->counts[kind], 1, __ATOMIC_SEQ_CST);
  if ((int)kind != now->kind) return 0;
  if (number == now->number) {
    strncpy(now->path, path, LONGEST - 1);
  } else if (number < now->number || !now->lasting || strcmp(path, now->path)) {
    return 0;
  }
  __atomic_add_fetch(&now->refused, 1, __ATOMIC_SEQ_CST);
  errno = now->error;
  return 1;
}

static int fails_at(enum kind kind, int folder, const char *name) {
  if (!settings || !name) return 0;
  char path[LONGEST];
  int before = errno;
  absolute(folder, name, path);
  errno = before;
  return fails(kind, path);
}

static int fails_on(enum kind kind, int file) {
  if (!settings || file < 0) return 0;
  char path[LONGEST];
  int before = errno;
  path_of(file, path);
  errno = before;
  return fails(kind, path);
}

// Defines a function of the C library that fails if `refused` holds, and else does what it does.
#define HOOK(result, failure, name, parameters, arguments, refused) \
  result name parameters {                                          \
    static result(*next) parameters;                                \
    if (!next) next = (result(*) parameters)dlsym(RTLD_NEXT, #name); \
    if (refused) return failure;                                    \
    return next arguments;                                          \
  }

// The same for functions that take a mode after their flags, if there is one.
#define HOOK_OPEN(name, parameters, arguments, refused)              \
  int name parameters {                                              \
    static int(*next) parameters;                                    \
    if (!next) next = (int(*) parameters)dlsym(RTLD_NEXT, #name);     \
    va_list rest;                                                    \
    va_start(rest, flags);                                           \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest);                                                    \
    if (refused) return -1;                                          \
    return next arguments;                                           \
  }

HOOK_OPEN(open, (const char *name, int flags, ...), (name, flags, mode),
          fails_at(OPEN, AT_FDCWD, name))
HOOK_OPEN(open64, (const char *name, int flags, ...), (name, flags, mode),
          fails_at(OPEN, AT_FDCWD, name))
HOOK_OPEN(openat, (int folder, const char *name, int flags, ...), (folder, name, flags, mode),
          fails_at(OPEN, folder, name))
HOOK_OPEN(openat64, (int folder, const char *name, int flags, ...), (folder, name, flags, mode),
          fails_at(OPEN, folder, name))
HOOK(int, -1, creat, (const char *name, mode_t mode), (name, mode), fails_at(OPEN, AT_FDCWD, name))
HOOK(int, -1, creat64, (const char *name, mode_t mode), (name, mode),
     fails_at(OPEN, AT_FDCWD, name))
HOOK(FILE *, NULL, fopen, (const char *name, const char *mode), (name, mode),
     fails_at(OPEN, AT_FDCWD, name))
HOOK(FILE *, NULL, fopen64, (const char *name, const char *mode), (name, mode),
     fails_at(OPEN, AT_FDCWD, name))
HOOK(DIR *, NULL, opendir, (const char *name), (name), fails_at(OPEN, AT_FDCWD, name))

HOOK(ssize_t, -1, read, (int file, void *data, size_t size), (file, data, size),
     fails_on(READ, file))
HOOK(ssize_t, -1, pread, (int file, void *data, size_t size, off_t at), (file, data, size, at),
     fails_on(READ, file))
HOOK(ssize_t, -1, pread64, (int file, void *data, size_t size, off64_t at), (file, data, size, at),
     fails_on(READ, file))
HOOK(ssize_t, -1, readv, (int file, const struct iovec *parts, int count), (file, parts, count),
     fails_on(READ, file))
HOOK(ssize_t, -1, preadv, (int file, const struct iovec *parts, int count, off_t at),
     (file, parts, count, at), fails_on(READ, file))
HOOK(ssize_t, -1, preadv64, (int file, const struct iovec *parts, int count, off64_t at),
     (file, parts, count, at), fails_on(READ, file))
HOOK(ssize_t, -1, preadv2,
     (int file, const struct iovec *parts, int count, off_t at, int flags),
     (file, parts, count, at, flags), fails_on(READ, file))
HOOK(ssize_t, -1, preadv64v2,
     (int file, const struct iovec *parts, int count, off64_t at, int flags),
     (file, parts, count, at, flags), fails_on(READ, file))
HOOK(ssize_t, -1, sendfile, (int to, int file, off_t *at, size_t size), (to, file, at, size),
     fails_on(READ, file))
HOOK(ssize_t, -1, sendfile64, (int to, int file, off64_t *at, size_t size), (to, file, at, size),
     fails_on(READ, file))
HOOK(ssize_t, -1, copy_file_range,
     (int file, off64_t *at, int to, off64_t *to_at, size_t size, unsigned int flags),
     (file, at, to, to_at, size, flags), fails_on(READ, file))

HOOK(void *, MAP_FAILED, mmap,
     (void *address, size_t size, int protection, int flags, int file, off_t at),
     (address, size, protection, flags, file, at), fails_on(MMAP, file))
HOOK(void *, MAP_FAILED, mmap64,
     (void *address, size_t size, int protection, int flags, int file, off64_t at),
     (address, size, protection, flags, file, at), fails_on(MMAP, file))

HOOK(int, -1, fsync, (int file), (file), fails_on(FSYNC, file))
HOOK(int, -1, fdatasync, (int file), (file), fails_on(FSYNC, file))

HOOK(int, -1, fchmod, (int file, mode_t mode), (file, mode), fails_on(FCHMOD, file))
HOOK(int, -1, chmod, (const char *name, mode_t mode), (name, mode),
     fails_at(FCHMOD, AT_FDCWD, name))
HOOK(int, -1, fchmodat, (int folder, const char *name, mode_t mode, int flags),
     (folder, name, mode, flags), fails_at(FCHMOD, folder, name))

HOOK(int, -1, flock, (int file, int operation), (file, operation), fails_on(FLOCK, file))
HOOK(int, -1, lockf, (int file, int operation, off_t size), (file, operation, size),
     fails_on(FLOCK, file))
HOOK(int, -1, lockf64, (int file, int operation, off64_t size), (file, operation, size),
     fails_on(FLOCK, file))

static int locks(int command) {
  return command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK ||
         command == F_OFD_SETLKW;
}

#define HOOK_FCNTL(name)                                                            \
  int name(int file, int command, ...) {                                            \
    static int (*next)(int, int, ...);                                              \
    if (!next) next = (int (*)(int, int, ...))dlsym(RTLD_NEXT, #name);               \
    va_list rest;                                                                   \
    va_start(rest, command);                                                        \
    void *argument = va_arg(rest, void *);                                          \
    va_end(rest);                                                                   \
    if (locks(command) && fails_on(FLOCK, file)) return -1;                          \
    return next(file, command, argument);                                           \
  }

HOOK_FCNTL(fcntl)
HOOK_FCNTL(fcntl64)

// A rename or a link is known by its new name, as a temporary name is never used twice.
HOOK(int, -1, rename, (const char *name, const char *to), (name, to),
     fails_at(RENAME, AT_FDCWD, to))
HOOK(int, -1, renameat, (int folder, const char *name, int to_folder, const char *to),
     (folder, name, to_folder, to), fails_at(RENAME, to_folder, to))
HOOK(int, -1, renameat2,
     (int folder, const char *name, int to_folder, const char *to, unsigned int flags),
     (folder, name, to_folder, to, flags), fails_at(RENAME, to_folder, to))
HOOK(int, -1, link, (const char *name, const char *to), (name, to), fails_at(LINK, AT_FDCWD, to))
HOOK(int, -1, linkat, (int folder, const char *name, int to_folder, const char *to, int flags),
     (folder, name, to_folder, to, flags), fails_at(LINK, to_folder, to))

HOOK(int, -1, unlink, (const char *name), (name), fails_at(UNLINK, AT_FDCWD, name))
HOOK(int, -1, unlinkat, (int folder, const char *name, int flags), (folder, name, flags),
     fails_at(UNLINK, folder, name))
HOOK(int, -1, remove, (const char *name), (name), fails_at(UNLINK, AT_FDCWD, name))
HOOK(int, -1, rmdir, (const char *name), (name), fails_at(UNLINK, AT_FDCWD, name))

HOOK(int, -1, statvfs, (const char *name, struct statvfs *found), (name, found),
     fails_at(STATVFS, AT_FDCWD, name))
HOOK(int, -1, statvfs64, (const char *name, struct statvfs64 *found), (name, found),
     fails_at(STATVFS, AT_FDCWD, name))
HOOK(int, -1, fstatvfs, (int file, struct statvfs *found), (file, found), fails_on(STATVFS, file))
HOOK(int, -1, fstatvfs64, (int file, struct statvfs64 *found), (file, found),
     fails_on(STATVFS, file))
HOOK(int, -1, statfs, (const char *name, struct statfs *found), (name, found),
     fails_at(STATVFS, AT_FDCWD, name))
HOOK(int, -1, statfs64, (const char *name, struct statfs64 *found), (name, found),
     fails_at(STATVFS, AT_FDCWD, name))
HOOK(int, -1, fstatfs, (int file, struct statfs *found), (file, found), fails_on(STATVFS, file))
HOOK(int, -1, fstatfs64, (int file, struct statfs64 *found), (file, found),
     fails_on(STATVFS, file))

static int fails_in_memory(const char *name) {
  char path[LONGEST];
  snprintf(path, sizeof path, SHARED_MEMORY "%s", name + (name[0] == '/'));
  return fails(SHM, path);
}

HOOK(int, -1, shm_open, (const char *name, int flags, mode_t mode), (name, flags, mode),
     fails_in_memory(name))

sem_t *sem_open(const char *name, int flags, ...) {
  static sem_t *(*next)(const char *, int, ...);
  if (!next) next = (sem_t * (*)(const char *, int, ...)) dlsym(RTLD_NEXT, "sem_open");
  va_list rest;
  va_start(rest, flags);
  mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0;
  unsigned value = flags & O_CREAT ? va_arg(rest, unsigned) : 0;
  va_end(rest);
  if (fails_in_memory(name)) return SEM_FAILED;
  return next(name, flags, mode, value);
}
