// Functions that the sources of this folder share.

#ifndef ONCELY_INTERNAL_H
#define ONCELY_INTERNAL_H

#include <stdarg.h>

#include "oncely.h"

// Frees the memory of the current message.
void oncely_free_all(void);

// Sets the last error and returns false.
bool oncely_fail(const char *reason, oncely_bytes text);
bool oncely_fail_with(oncely_error error);

// A copy that ends with a NUL byte.
oncely_bytes oncely_copy(const void *data, size_t length);

oncely_bytes oncely_format_list(const char *format, va_list arguments);

// Writes one line to the log of the host.
void oncely_write_log(oncely_level level, oncely_bytes line);

// Writes the text of a panic to the log of the host.
void oncely_write_panic(oncely_bytes text);

#endif
