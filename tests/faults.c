/* System calls that fail, or kill the process, at the N-th that changes a file below a folder.
 *
 *     cc -shared -fPIC -O1 -o faults.so faults.c -ldl
 *     LD_PRELOAD=faults.so python faults.py
 *
 * faults_arm(folder, n, what) starts to count: opening for writing, write, fsync, rename, unlink,
 * mkdir, and at what = READ opening and reading. The n-th fails with EIO (what = FAIL) or ENOSPC
 * (FULL), kills (KILL; of a write half is written before), or with READ every n-th fails with EIO.
 * faults_count() is how many there were.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OFF, FAIL, FULL, KILL, READ };

static char folder[PATH_MAX];
static atomic_long counted;
static long nth;
static atomic_int what;

void faults_arm(const char *below, long n, int kind) {
    strncpy(folder, below, sizeof folder - 1);
    counted = 0;
    nth = n;
    what = kind;
}

long faults_count(void) { return counted; }

#define NEXT(name) \
    static __typeof__(&name) next; \
    if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static int below(const char *path) {
    return what != OFF && path && strncmp(path, folder, strlen(folder)) == 0;
}

static int open_below(int fd) {
    char link[64], path[PATH_MAX];
    if (what == OFF) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return below(path);
}

/* Whether this call is the one: then errno is set, or the process ends, unless half is to come. */
static int fails(int half) {
    long now = atomic_fetch_add(&counted, 1) + 1;
    if (what == READ ? now % nth : now != nth) return 0;
    if (what == KILL && !half) kill(getpid(), SIGKILL);
    errno = what == FULL ? ENOSPC : EIO;
    return 1;
}

static int counts(int flags) { return (what == READ) != ((flags & O_ACCMODE) != O_RDONLY); }

/* open and openat, in which `at,` stands before the path or nothing does. */
#define OPEN(name, parameters, ...) \
    int name(parameters const char *path, int flags, ...) { \
        NEXT(name); \
        va_list more; \
        va_start(more, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; \
        va_end(more); \
        if (below(path) && counts(flags) && fails(0)) return -1; \
        return next(__VA_ARGS__ path, flags, mode); \
    }
#define AT int at,
#define HERE at,
OPEN(open, , )
OPEN(open64, , )
OPEN(openat, AT, HERE)
OPEN(openat64, AT, HERE)

#define OPENED(name) \
    FILE *name(const char *path, const char *mode) { \
        NEXT(name); \
        int flags = strpbrk(mode, "wa+") ? O_RDWR : O_RDONLY; \
        if (below(path) && counts(flags) && fails(0)) return NULL; \
        return next(path, mode); \
    }
OPENED(fopen)
OPENED(fopen64)

ssize_t write(int fd, const void *data, size_t size) {
    NEXT(write);
    if (what != READ && open_below(fd) && fails(1)) {
        if (what == KILL) {
            ssize_t done = next(fd, data, size / 2);
            kill(getpid(), SIGKILL);
            return done;
        }
        return -1;
    }
    return next(fd, data, size);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    NEXT(pwrite64);
    if (what != READ && open_below(fd) && fails(0)) return -1;
    return next(fd, data, size, at);
}

ssize_t writev(int fd, const struct iovec *parts, int n) {
    NEXT(writev);
    if (what != READ && open_below(fd) && fails(0)) return -1;
    return next(fd, parts, n);
}

ssize_t read(int fd, void *data, size_t size) {
    NEXT(read);
    if (what == READ && open_below(fd) && fails(0)) return -1;
    return next(fd, data, size);
}

#define FLUSH(name) \
    int name(int fd) { \
        NEXT(name); \
        if (what != READ && open_below(fd) && fails(0)) return -1; \
        return next(fd); \
    }
FLUSH(fsync)
FLUSH(fdatasync)

int ftruncate64(int fd, off64_t size) {
    NEXT(ftruncate64);
    if (what != READ && open_below(fd) && fails(0)) return -1;
    return next(fd, size);
}

#define TWO(name) \
    int name(const char *from, const char *to) { \
        NEXT(name); \
        if (what != READ && below(to) && fails(0)) return -1; \
        return next(from, to); \
    }
TWO(rename)
TWO(link)

int renameat(int a, const char *from, int b, const char *to) {
    NEXT(renameat);
    if (what != READ && below(to) && fails(0)) return -1;
    return next(a, from, b, to);
}

#define ONE(name) \
    int name(const char *path) { \
        NEXT(name); \
        if (what != READ && below(path) && fails(0)) return -1; \
        return next(path); \
    }
ONE(unlink)
ONE(rmdir)

int unlinkat(int at, const char *path, int flags) {
    NEXT(unlinkat);
    if (what != READ && (below(path) || open_below(at)) && fails(0)) return -1;
    return next(at, path, flags);
}

int mkdir(const char *path, mode_t mode) {
    NEXT(mkdir);
    if (what != READ && below(path) && fails(0)) return -1;
    return next(path, mode);
}
