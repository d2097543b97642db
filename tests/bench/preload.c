/* A slow disk and a clock that jumps, under a program that knows of neither: gcc -shared -fPIC preload.c -o preload.so -ldl

LD_PRELOAD=./preload.so PRELOAD_ORDERS=FILE PRELOAD_FOLDER=FOLDER program
FILE holds two numbers, read again at each use: seconds that the clock of the day is ahead, and milliseconds that a write
of 64 KiB or an fsync takes below FOLDER. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <limits.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

static void orders(double *ahead, double *slow) {
    *ahead = *slow = 0;
    const char *path = getenv("PRELOAD_ORDERS");
    FILE *file = path ? fopen(path, "r") : NULL;
    if (!file) return;
    if (fscanf(file, "%lf %lf", ahead, slow) < 1) *ahead = *slow = 0;
    fclose(file);
}

static void wait_for(int fd, size_t bytes) {
    char link[64], path[PATH_MAX];
    const char *folder = getenv("PRELOAD_FOLDER");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (!folder || length < 0) return;
    path[length] = 0;
    if (strncmp(path, folder, strlen(folder))) return;
    double ahead, slow;
    orders(&ahead, &slow);
    double seconds = slow / 1e3 * (bytes < 65536 ? 1 : bytes / 65536.0);
    struct timespec pause = {(time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9)};
    if (slow > 0) nanosleep(&pause, NULL);
}

ssize_t write(int fd, const void *data, size_t size) {
    static ssize_t (*plain)(int, const void *, size_t);
    if (!plain) plain = (ssize_t(*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
    if (fd > 2) wait_for(fd, size);
    return plain(fd, data, size);
}

int fsync(int fd) {
    static int (*plain)(int);
    if (!plain) plain = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    wait_for(fd, 0);
    return plain(fd);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    long failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && clock == CLOCK_REALTIME) {
        double ahead, slow;
        orders(&ahead, &slow);
        now->tv_sec += (time_t)ahead;
    }
    return (int)failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec exact;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (out) *out = exact.tv_sec;
    return exact.tv_sec;
}

/* Deadlines by the clock of the day are given in a time that the kernel does not know of. */
int sem_timedwait(sem_t *restrict sem, const struct timespec *restrict deadline) {
    static int (*plain)(sem_t *, const struct timespec *);
    if (!plain) plain = (int (*)(sem_t *, const struct timespec *))dlsym(RTLD_NEXT, "sem_timedwait");
    double ahead, slow;
    orders(&ahead, &slow);
    struct timespec own = {deadline->tv_sec - (time_t)ahead, deadline->tv_nsec};
    return plain(sem, &own);
}
