//! Checks of a component's code: validity, and limits on its compile cost.
//!
//! The time and memory of a compiler grow faster than the size of its input, above all with the
//! locals of a function times its branches. The limits here refuse extreme cases before anything is
//! compiled. The limits of the compiling process bound the rest.

use anyhow::{Result, anyhow};
use wasmparser::{
    FuncValidatorAllocations, FunctionBody, Operator, Parser, Payload, ValidPayload, Validator,
    WasmFeatures,
};

use super::{file_format, is_async};
use crate::model::hint::WithHint;

/// Functions of all modules together, imported ones included.
const FUNCTIONS_MAX: u64 = 100_000;

/// Types of all modules and components together.
const TYPES_MAX: u64 = 100_000;

/// Imports, exports, aliases, instances and segments of all modules and components together.
const ITEMS_MAX: u64 = 500_000;

/// The body of one function, in bytes.
const BODY_MAX: u64 = 2 << 20;

/// Parameters and locals of one function.
const LOCALS_MAX: u64 = 20_000;

/// Blocks, loops and branches of one function.
const BRANCHES_MAX: u64 = 100_000;

/// Loops of one function: the compiler's time grows with their square.
const LOOPS_MAX: u64 = 5_000;

/// Locals of one function times its blocks, loops and branches, because the compiler tracks each
/// local along each branch.
const LOCALS_BY_BRANCHES_MAX: u64 = 4_000_000;

/// The nesting depth of blocks in one function.
const NESTING_MAX: u64 = 10_000;

/// The features of the host's engine: WebAssembly 3.0 without threads, exceptions, 64-bit memories
/// and garbage collection. Components with async functions run in an engine of their own.
fn features(is_async: bool) -> WasmFeatures {
    let absent = WasmFeatures::THREADS
        | WasmFeatures::EXCEPTIONS
        | WasmFeatures::MEMORY64
        | WasmFeatures::GC_TYPES;
    let mut features = (WasmFeatures::WASM3 | WasmFeatures::COMPONENT_MODEL).difference(absent);
    features.set(WasmFeatures::CM_ASYNC, is_async);
    features
}

/// Checks that all code of a component is valid and within the limits.
pub fn check_code(wasm: &[u8]) -> Result<()> {
    let mut totals = CodeTotals::default();
    let refused = |error| invalid_code(&error);
    let features = features(is_async(wasm)?);
    let mut validator = Validator::new_with_features(features);
    let mut allocations = FuncValidatorAllocations::default();
    let mut parser = Parser::new(0);
    parser.set_features(features);
    for payload in parser.parse_all(wasm) {
        let payload = payload.map_err(refused)?;
        // Before the validator, which keeps all types in memory.
        totals.count(&payload)?;
        if let ValidPayload::Func(function, body) = validator.payload(&payload).map_err(refused)? {
            let mut function = function.into_validator(allocations);
            let params = function.len_locals();
            totals.check_body(&body, params)?.map_err(refused)?;
            function.validate(&body).map_err(refused)?;
            allocations = function.into_allocations();
        }
    }
    Ok(())
}

/// Totals over all modules and components so far.
#[derive(Default)]
struct CodeTotals {
    functions: u64,
    types: u64,
    items: u64,
}

impl CodeTotals {
    /// Counts the items of a section by its declared number, without reading them.
    fn count(&mut self, payload: &Payload<'_>) -> Result<()> {
        let (functions, types, items) = match payload {
            Payload::FunctionSection(section) => (section.count(), 0, 0),
            Payload::TypeSection(section) => (0, section.count(), 0),
            Payload::CoreTypeSection(section) => (0, section.count(), 0),
            Payload::ComponentTypeSection(section) => (0, section.count(), 0),
            Payload::ImportSection(section) => (0, 0, section.count()),
            Payload::ExportSection(section) => (0, 0, section.count()),
            Payload::InstanceSection(section) => (0, 0, section.count()),
            Payload::ComponentInstanceSection(section) => (0, 0, section.count()),
            Payload::ComponentAliasSection(section) => (0, 0, section.count()),
            Payload::ComponentCanonicalSection(section) => (section.count(), 0, 0),
            Payload::ComponentImportSection(section) => (0, 0, section.count()),
            Payload::ComponentExportSection(section) => (0, 0, section.count()),
            Payload::GlobalSection(section) => (0, 0, section.count()),
            Payload::ElementSection(section) => (0, 0, section.count()),
            Payload::DataSection(section) => (0, 0, section.count()),
            Payload::ModuleSection { .. } | Payload::ComponentSection { .. } => (0, 0, 1),
            _ => (0, 0, 0),
        };
        self.functions += u64::from(functions);
        self.types += u64::from(types);
        self.items += u64::from(items);
        check_limit("it has {} functions", self.functions, FUNCTIONS_MAX)?;
        check_limit("it declares {} types", self.types, TYPES_MAX)?;
        check_limit(
            "it has {} imports, exports, aliases, instances and segments",
            self.items,
            ITEMS_MAX,
        )
    }

    /// Checks the body of a function with `params` parameters. The inner error is a parse error of
    /// its bytes.
    fn check_body(&self, body: &FunctionBody<'_>, params: u32) -> Result<wasmparser::Result<()>> {
        let at = body.range().start;
        check_limit(
            "a function has {} bytes",
            body.range().len() as u64,
            BODY_MAX,
        )
        .map_err(|error| at_function(error, at))?;
        let cost = match FunctionCost::measure(body, params) {
            Ok(cost) => cost,
            Err(error) => return Ok(Err(error)),
        };
        cost.check().map_err(|error| at_function(error, at))?;
        Ok(Ok(()))
    }
}

/// The numbers with which the compile cost of a function grows.
#[derive(Debug, Default, Clone, Copy)]
struct FunctionCost {
    locals: u64,
    branches: u64,
    loops: u64,
    nesting: u64,
}

impl FunctionCost {
    fn measure(body: &FunctionBody<'_>, params: u32) -> wasmparser::Result<FunctionCost> {
        let mut cost = FunctionCost {
            locals: u64::from(params),
            ..FunctionCost::default()
        };
        for local in body.get_locals_reader()? {
            let (count, _) = local?;
            cost.locals += u64::from(count);
        }

        // Branches, loops and nesting.
        let mut depth = 0_u64;
        let mut operators = body.get_operators_reader()?;
        while !operators.eof() {
            let operator = operators.read()?;
            cost.loops += u64::from(matches!(operator, Operator::Loop { .. }));
            match operator {
                Operator::Block { .. }
                | Operator::Loop { .. }
                | Operator::If { .. }
                | Operator::TryTable { .. } => {
                    cost.branches += 1;
                    depth += 1;
                    cost.nesting = cost.nesting.max(depth);
                }
                Operator::Else
                | Operator::BrIf { .. }
                | Operator::BrOnNull { .. }
                | Operator::BrOnNonNull { .. } => {
                    cost.branches += 1;
                }
                Operator::BrTable { targets } => cost.branches += 1 + u64::from(targets.len()),
                Operator::End => depth = depth.saturating_sub(1),
                _ => {}
            }
        }
        Ok(cost)
    }

    fn check(self) -> Result<()> {
        check_limit("a function has {} locals", self.locals, LOCALS_MAX)?;
        check_limit("a function has {} branches", self.branches, BRANCHES_MAX)?;
        check_limit("a function has {} loops", self.loops, LOOPS_MAX)?;
        check_limit("a function nests {} blocks", self.nesting, NESTING_MAX)?;
        let product = self.locals.saturating_mul(self.branches);
        check_limit(
            "the locals of a function times its branches are {}",
            product,
            LOCALS_BY_BRANCHES_MAX,
        )
    }
}

/// Refuses a number above its limit; `sentence` describes it, with `{}` for the number.
fn check_limit(sentence: &str, found: u64, max: u64) -> Result<()> {
    if found <= max {
        return Ok(());
    }
    let found = sentence.replace("{}", &found.to_string());
    Err(anyhow!(
        "the component exceeds a compiler limit: {found}; at most {max} are allowed"
    ))
    .hint(
        "build it with optimisation, and split generated code into smaller functions \
         or several workers",
    )
}

/// Adds the position of the function that exceeds a limit.
fn at_function(error: anyhow::Error, at: usize) -> anyhow::Error {
    error.context(format!("the function at byte {at} is too large"))
}

/// The reason why bytes are refused: an unsupported feature, or damage.
fn invalid_code(error: &wasmparser::Error) -> anyhow::Error {
    let Some(missing) = error.missing_wasm_feature() else {
        return file_format::damaged(error);
    };
    let named: Vec<String> = missing
        .iter_names()
        .map(|(name, _)| name.to_lowercase().replace('_', "-"))
        .collect();
    anyhow!(
        "{} (byte {})",
        file_format::first_line(error.message()),
        error.offset()
    )
    .context(format!(
        "the component uses WebAssembly features that hosts do not support: {}",
        named.join(", ")
    ))
    .hint(
        "build it without that feature; \
             threads, exceptions, 64-bit memories and garbage collection are not supported",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(locals: u64, branches: u64) -> Result<()> {
        FunctionCost {
            locals,
            branches,
            loops: 1,
            nesting: 1,
        }
        .check()
    }

    #[test]
    fn locals_and_branches_are_limited_alone_and_together() {
        assert!(check(300, 10_000).is_ok());
        assert!(check(LOCALS_MAX + 1, 1).is_err());
        assert!(check(1, BRANCHES_MAX + 1).is_err());
        let error = format!("{:#}", check(2_000, 5_000).unwrap_err());
        assert!(
            error.contains("times its branches are 10000000; at most 4000000 are allowed"),
            "{error}"
        );
    }
}
