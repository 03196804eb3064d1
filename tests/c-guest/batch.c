// A handler for batches in C: it sends one output for each message, and rejects empty bodies.

#include "oncely/oncely.h"

void oncely_handle_batch(const oncely_message *messages, oncely_result *results, size_t count) {
    for (size_t i = 0; i < count; i++) {
        oncely_send_options options = {.caused_by = messages[i].id.data};
        if (messages[i].body.length == 0) {
            results[i] = oncely_reject("empty", "message %zu of %zu is empty", i + 1, count);
        } else if (!oncely_send("out.batch", messages[i].body, &options)) {
            results[i] = oncely_failed();
        }
    }
}
