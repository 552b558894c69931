/* A library for LD_PRELOAD that makes file operations fail, as a failing, full or read-only disk does.
 *
 * It does nothing until arm() is called. Then it counts the calls of one kind that concern a path in one of two folders,
 * and the n-th of them (if `lasting`, also all later ones) fails. Every call that fails is written to a log as one line:
 * its kind and its path. With n = 0 nothing fails, and the calls of all kinds are written.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static char kind[16], folders[2][PATH_MAX];
static int armed, error, lasting, logged = -1;
static long wanted, calls;

void arm(const char *kind_, long n, int error_, int lasting_, const char *folder1, const char *folder2, const char *log) {
    snprintf(kind, sizeof kind, "%s", kind_);
    snprintf(folders[0], PATH_MAX, "%s", folder1);
    snprintf(folders[1], PATH_MAX, "%s", folder2);
    wanted = n, error = error_, lasting = lasting_;
    logged = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    armed = 1;
}

/* The path of `name` relative to an open directory, or of the open file `fd` if name is NULL. */
static int find_path(int fd, const char *name, char *path) {
    char link[64];
    ssize_t length = 0;
    if (name && (*name == '/' || fd == AT_FDCWD))
        return snprintf(path, PATH_MAX, "%s", name) < PATH_MAX;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if ((length = readlink(link, path, PATH_MAX - 1)) < 0)
        return 0;
    path[length] = 0;
    return !name || snprintf(path + length, PATH_MAX - length, "/%s", name) < PATH_MAX - length;
}

/* Whether this call must fail; errno is set then. */
static int fails(const char *kind_, int fd, const char *name) {
    char path[PATH_MAX], line[PATH_MAX + 20];
    int before = errno, inside = 0, hit;
    if (!armed || (wanted && strcmp(kind, kind_)) || !find_path(fd, name, path))
        return errno = before, 0;
    for (int i = 0; i < 2; i++) {
        size_t length = strlen(folders[i]);
        inside |= !strncmp(path, folders[i], length) && (path[length] == '/' || !path[length]);
    }
    errno = before;
    if (!inside)
        return 0;
    long n = __sync_add_and_fetch(&calls, 1);
    hit = wanted && (n == wanted || (lasting && n > wanted));
    if (!wanted || hit)
        syscall(SYS_write, logged, line, snprintf(line, sizeof line, "%s %s\n", kind_, path));
    errno = hit ? error : before;
    return hit;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL_OR(type, name, kind_, fd, path, parameters, arguments)        \
    type name parameters {                                                 \
        static __typeof__(&name) real;                                     \
        if (!real)                                                         \
            real = REAL(name);                                             \
        return fails(kind_, fd, path) ? (type)-1 : real arguments;         \
    }

static const char *opening(int flags) {
    return flags & (O_WRONLY | O_RDWR | O_CREAT) ? "create" : "open";
}

#define OPEN(name)                                                                                \
    int name(const char *path, int flags, ...) {                                                  \
        va_list rest;                                                                             \
        va_start(rest, flags);                                                                    \
        mode_t mode = va_arg(rest, mode_t);                                                       \
        va_end(rest);                                                                             \
        return fails(opening(flags), AT_FDCWD, path) ? -1 : REAL(name)(path, flags, mode);        \
    }
#define OPENAT(name)                                                                              \
    int name(int fd, const char *path, int flags, ...) {                                          \
        va_list rest;                                                                             \
        va_start(rest, flags);                                                                    \
        mode_t mode = va_arg(rest, mode_t);                                                       \
        va_end(rest);                                                                             \
        return fails(opening(flags), fd, path) ? -1 : REAL(name)(fd, path, flags, mode);          \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

FAIL_OR(ssize_t, write, "write", fd, NULL, (int fd, const void *data, size_t n), (fd, data, n))
FAIL_OR(ssize_t, writev, "write", fd, NULL, (int fd, const struct iovec *data, int n), (fd, data, n))
FAIL_OR(ssize_t, pwrite, "write", fd, NULL, (int fd, const void *data, size_t n, off_t at), (fd, data, n, at))
FAIL_OR(ssize_t, pwrite64, "write", fd, NULL, (int fd, const void *data, size_t n, off_t at), (fd, data, n, at))
FAIL_OR(ssize_t, sendfile, "write", out, NULL, (int out, int in, off_t *at, size_t n), (out, in, at, n))
FAIL_OR(ssize_t, sendfile64, "write", out, NULL, (int out, int in, off_t *at, size_t n), (out, in, at, n))
FAIL_OR(ssize_t, copy_file_range, "write", out, NULL,
        (int in, off_t *from, int out, off_t *to, size_t n, unsigned flags), (in, from, out, to, n, flags))
FAIL_OR(int, ftruncate, "write", fd, NULL, (int fd, off_t length), (fd, length))
FAIL_OR(int, ftruncate64, "write", fd, NULL, (int fd, off_t length), (fd, length))
FAIL_OR(int, fsync, "fsync", fd, NULL, (int fd), (fd))
FAIL_OR(int, fdatasync, "fsync", fd, NULL, (int fd), (fd))
FAIL_OR(int, rename, "rename", AT_FDCWD, to, (const char *from, const char *to), (from, to))
FAIL_OR(int, renameat, "rename", fd2, to, (int fd1, const char *from, int fd2, const char *to), (fd1, from, fd2, to))
FAIL_OR(int, mkdir, "mkdir", AT_FDCWD, path, (const char *path, mode_t mode), (path, mode))
FAIL_OR(int, mkdirat, "mkdir", fd, path, (int fd, const char *path, mode_t mode), (fd, path, mode))
FAIL_OR(int, unlink, "unlink", AT_FDCWD, path, (const char *path), (path))
FAIL_OR(int, unlinkat, "unlink", fd, path, (int fd, const char *path, int flags), (fd, path, flags))
FAIL_OR(int, rmdir, "unlink", AT_FDCWD, path, (const char *path), (path))
FAIL_OR(ssize_t, read, "read", fd, NULL, (int fd, void *data, size_t n), (fd, data, n))
FAIL_OR(ssize_t, readv, "read", fd, NULL, (int fd, const struct iovec *data, int n), (fd, data, n))
FAIL_OR(ssize_t, pread, "pread", fd, NULL, (int fd, void *data, size_t n, off_t at), (fd, data, n, at))
FAIL_OR(ssize_t, pread64, "pread", fd, NULL, (int fd, void *data, size_t n, off_t at), (fd, data, n, at))
FAIL_OR(ssize_t, preadv, "pread", fd, NULL, (int fd, const struct iovec *data, int n, off_t at), (fd, data, n, at))
FAIL_OR(ssize_t, preadv64, "pread", fd, NULL, (int fd, const struct iovec *data, int n, off64_t at), (fd, data, n, at))
