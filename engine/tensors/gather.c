/* Ranges of a file, each read to its own place in memory: what rows in the order of another vocabulary are.
 *
 * A range that the system holds is copied at once. The others are asked for together and then waited for, so that a
 * disk has many of them to do and not one after the other; what lies around them is asked for as well, as the caller
 * says, since it will be wanted where all of a file is read in another order.
 */

#if defined(__linux__) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* syscall */
#endif

#include "native.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

/* By the kernel's own numbers: wheels are built where the C library has no preadv2 yet. */
#if defined(__linux__) && defined(__x86_64__) && defined(__LP64__)
#define PREADV2 327L
#elif defined(__linux__) && defined(__aarch64__) && defined(__LP64__)
#define PREADV2 286L
#endif
#define NOWAIT 8L /* RWF_NOWAIT */

#define MOST_WAITED 1024 /* ranges that are waited for at once */

_Static_assert(sizeof(off_t) == sizeof(int64_t), "files may be larger than 2 GiB");

/* The error, or -1 where the file ends before; 0 once all is there. */
static int32_t read_range(int32_t file, uint8_t *into, int64_t size, int64_t offset) {
    for (int64_t done = 0; done < size;) {
        const ssize_t found = pread(file, into + done, (size_t)least(size - done, 1 << 30), (off_t)(offset + done));
        if (found > 0) done += found;
        else if (found == 0) return -1;
        else if (errno != EINTR) return errno;
    }
    return 0;
}

/* Whether the system held a range and copied it. */
static int read_held(int32_t file, uint8_t *into, int64_t size, int64_t offset) {
#ifdef PREADV2
    const struct iovec whole = {into, (size_t)size};
    return syscall(PREADV2, (long)file, &whole, 1L, (long)offset, 0L, NOWAIT) == (long)size;
#else
    (void)file, (void)into, (void)size, (void)offset;
    return 0;
#endif
}

/* Ask for a range with all of the windows that it lies in; returns how many bytes these are. */
static int64_t ask(int32_t file, int64_t size, int64_t offset, int64_t window) {
    const int64_t start = offset / window * window, stop = (offset + size + window - 1) / window * window;
#ifdef POSIX_FADV_WILLNEED
    (void)posix_fadvise(file, (off_t)start, (off_t)(stop - start), POSIX_FADV_WILLNEED);
#else
    (void)file;
#endif
    return stop - start;
}

/* Fill `sizes[i]` bytes from `into + places[i]` on with those of the file from `offsets[i]` on. Returns `count`, or the
 * number of a range that could not be read, with its `error`: -1 where the file ends in it. `asked` is added the bytes
 * that were asked for, in windows of so many. */
int64_t mergemill_read_ranges(int32_t file, const int64_t *offsets, const int64_t *places, const int64_t *sizes,
                              int64_t count, int64_t window, uint8_t *into, int64_t *asked, int32_t *error) {
    int64_t waited[MOST_WAITED];
    for (int64_t next = 0; next < count;) {
        int64_t many = 0;
        for (; next < count && many < MOST_WAITED; next++) {
            if (read_held(file, into + places[next], sizes[next], offsets[next])) continue;
            *asked += ask(file, sizes[next], offsets[next], window);
            waited[many++] = next;
        }
        for (int64_t i = 0; i < many; i++) {
            const int64_t each = waited[i];
            *error = read_range(file, into + places[each], sizes[each], offsets[each]);
            if (*error) return each;
        }
    }
    return count;
}
