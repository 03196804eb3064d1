//! Memory limit of one call, over all its memories and tables.

use wasmtime::ResourceLimiter;

/// Maximum number of table elements of one call.
const TABLE_ELEMENTS_MAX: usize = 200_000;

/// Counts the memory of all instances of one call. A growth beyond the limit is refused, as on a
/// machine without free memory. The refusal is recorded, because most guests then abort without a
/// message.
#[derive(Debug)]
pub(super) struct Limiter {
    memory_limit: usize,
    memory: usize,
    table_elements: usize,
    pub refused_memory: bool,
    /// Whether the machine ran out of memory below the limit.
    pub out_of_memory: bool,
}

impl Limiter {
    pub fn new(memory_limit: usize) -> Self {
        Limiter {
            memory_limit,
            memory: 0,
            table_elements: 0,
            refused_memory: false,
            out_of_memory: false,
        }
    }

    pub fn memory_limit(&self) -> usize {
        self.memory_limit
    }
}

impl ResourceLimiter for Limiter {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        _: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let total = self.memory.saturating_add(desired.saturating_sub(current));
        let allowed = total <= self.memory_limit;
        if allowed {
            self.memory = total;
        } else {
            self.refused_memory = true;
        }
        Ok(allowed)
    }

    fn memory_grow_failed(&mut self, _: wasmtime::Error) -> wasmtime::Result<()> {
        self.out_of_memory = true;
        Ok(())
    }

    fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        _: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let total = self
            .table_elements
            .saturating_add(desired.saturating_sub(current));
        let allowed = total <= TABLE_ELEMENTS_MAX;
        if allowed {
            self.table_elements = total;
        }
        Ok(allowed)
    }
}
