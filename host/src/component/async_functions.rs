//! Whether a component uses async functions, streams or futures: the part of the component model
//! that WASI 0.3 added.

use anyhow::Result;
use wasmparser::{
    CanonicalFunction, CanonicalOption, ComponentDefinedType, ComponentType,
    ComponentTypeDeclaration, InstanceTypeDeclaration, Parser, Payload,
};

use super::file_format;

/// Whether the component, or one inside it, needs an engine with async functions.
pub fn is_async(wasm: &[u8]) -> Result<bool> {
    let damaged = |error| file_format::damaged(&error);
    for payload in Parser::new(0).parse_all(wasm) {
        match payload.map_err(damaged)? {
            Payload::ComponentCanonicalSection(section) => {
                for function in section {
                    if is_async_canonical(&function.map_err(damaged)?) {
                        return Ok(true);
                    }
                }
            }
            Payload::ComponentTypeSection(section) => {
                for ty in section {
                    if is_async_type(&ty.map_err(damaged)?) {
                        return Ok(true);
                    }
                }
            }
            _ => {}
        }
    }
    Ok(false)
}

fn is_async_canonical(function: &CanonicalFunction) -> bool {
    match function {
        CanonicalFunction::Lift { options, .. } | CanonicalFunction::Lower { options, .. } => {
            options.contains(&CanonicalOption::Async)
        }
        CanonicalFunction::ResourceNew { .. }
        | CanonicalFunction::ResourceDrop { .. }
        | CanonicalFunction::ResourceRep { .. } => false,
        _ => true,
    }
}

fn is_async_type(ty: &ComponentType<'_>) -> bool {
    match ty {
        ComponentType::Func(function) => function.async_,
        ComponentType::Defined(ty) => matches!(
            ty,
            ComponentDefinedType::Future(_) | ComponentDefinedType::Stream(_)
        ),
        ComponentType::Component(declarations) => declarations.iter().any(|declaration| {
            matches!(declaration, ComponentTypeDeclaration::Type(ty) if is_async_type(ty))
        }),
        ComponentType::Instance(declarations) => declarations.iter().any(|declaration| {
            matches!(declaration, InstanceTypeDeclaration::Type(ty) if is_async_type(ty))
        }),
        ComponentType::Resource { .. } => false,
    }
}
