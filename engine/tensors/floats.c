/* How this thread's processor computes floats: by registers that threads inherit, and that anybody may have changed. */

#include "native.h"

#if defined(__x86_64__)
/* Above, the word of the old unit, of which libraries of decompositions make use. Both as in a process that begins: to
 * nearest, with all digits, denormals kept, and no exception ends the process. */
#define PLAIN (0x37Full << 32 | 0x1F80)
#define SEEN 0x3F /* exceptions that there were: no mode */

static uint64_t read_control(void) {
    uint16_t old;
    __asm__ volatile("fnstcw %0" : "=m"(old));
    return (uint64_t)old << 32 | __builtin_ia32_stmxcsr();
}

static void write_control(uint64_t control) {
    const uint16_t old = (uint16_t)(control >> 32);
    __asm__ volatile("fldcw %0" : : "m"(old));
    __builtin_ia32_ldmxcsr((unsigned)control);
}
#elif defined(__aarch64__)
#define PLAIN 0
#define SEEN 0

static uint64_t read_control(void) {
    uint64_t control;
    __asm__ volatile("mrs %0, fpcr" : "=r"(control));
    return control;
}

static void write_control(uint64_t control) { __asm__ volatile("msr fpcr, %0" : : "r"(control) : "memory"); }
#else /* no such modes are known of it */
#define PLAIN 0
#define SEEN 0

static uint64_t read_control(void) { return 0; }

static void write_control(uint64_t control) { (void)control; }
#endif

/* Compute as a process does that has just begun; `before` gets the registers as they were. Returns whether that was so. */
int32_t mergemill_plain_floats(uint64_t *before) {
    *before = read_control();
    write_control(PLAIN);
    return (*before & ~(uint64_t)SEEN) == PLAIN;
}

/* Give them back. */
void mergemill_restore_floats(uint64_t before) { write_control(before); }
