//! Events that must happen in a campaign before a mutant may count as not caught.

use oncely::fault;
use support::proxy::Cut;

use crate::campaign::Act;
use crate::workload::{Nature, Often};

/// The required exposure of a mutant; a run without it proves nothing.
#[derive(Debug, Clone, Default)]
pub struct Exposure {
    /// Faults to inject, each with its minimum count.
    pub acts: Vec<(Act, u64)>,
    /// A nature published far more often than usual, with its minimum count.
    pub often: Option<(Often, u64)>,
    /// Minimum count of output ids that the stranger takes before their publication.
    pub taken_ids: u64,
    /// Minimum harm recorded by the mutant itself. Faults continue until then.
    pub harm: u64,
}

impl Exposure {
    /// The exposure of a mutant, or none if no campaign is designed for it. The unchanged host
    /// (`none`) gets the faults of all mutants.
    pub fn for_mutant(mutant: &str) -> Option<Exposure> {
        let acts = |acts: &[(Act, u64)]| Exposure {
            acts: acts.to_vec(),
            ..Exposure::default()
        };
        let often = |often, times| Exposure {
            often: Some((often, times)),
            ..Exposure::default()
        };
        Some(match mutant {
            // Messages in flight are lost when the host dies.
            fault::ACK_BEFORE_COMMIT | fault::INBOX_IN_OWN_TX => acts(&[(Act::Kill, 6)]),
            // The commit did not happen, and succeeds on another connection.
            fault::RESEND_COMMIT => acts(&[(Act::Cut(Cut::CommitNotForwarded), 6)]),
            // The commit happens after the check for it.
            fault::RESOLVE_BY_SELECT => Exposure {
                harm: 2,
                ..acts(&[(Act::Cut(Cut::CommitDelayed), 4)])
            },
            // The server writes asynchronous commits seconds later, so a stop loses the last ones.
            fault::SYNCHRONOUS_COMMIT_OFF => acts(&[(Act::StopDatabase, 6)]),
            // Unpublished outputs are left to the poller.
            fault::CURSOR_BY_SEQ => {
                acts(&[(Act::Cut(Cut::OutputsNotForwarded), 4), (Act::Kill, 2)])
            }
            // Outputs are marked as published but did not arrive.
            fault::MARK_BEFORE_PUBACK | fault::MARK_WITHOUT_FILTER => acts(&[
                (Act::Cut(Cut::OutputsNotForwarded), 5),
                (Act::KillBroker, 2),
            ]),
            // Duplicates are frequent, and every effect leaves a trace in its session.
            fault::SKIP_CLAIM | fault::NO_SESSION_RESET => Exposure::default(),
            fault::SKIP_RELEASE => often(Often::Nature(Nature::FailsOnce), 20),
            fault::CHARGE_WHOLE_BATCH => often(Often::Nature(Nature::FailsOnceLate), 20),
            fault::IGNORE_COMMIT_TAG => often(Often::Nature(Nature::Swallows), 15),
            fault::REUSE_AFTER_TRAP => often(Often::Nature(Nature::Trap), 15),
            fault::SKIP_DEAD_LETTER => often(Often::Nature(Nature::Malformed), 15),
            fault::ALLOW_RESERVED_HEADERS => often(Often::Nature(Nature::ReservedHeader), 15),
            fault::TRUST_DUPLICATE => Exposure {
                taken_ids: 20,
                ..Exposure::default()
            },
            // The stranger also sends each pointer to another worker.
            fault::POINTER_WITHOUT_WORKER => often(Often::Nature(Nature::Redriven), 20),
            // Outputs leased by a dead host wait until their leases run out.
            fault::LEASES_WITHOUT_INSTANCE => acts(&[(Act::DieWithLeases, 3)]),
            fault::DROP_PAYLOAD_HASH => often(Often::IdReuse, 15),
            "none" => acts(&[
                (Act::Kill, 3),
                (Act::StopDatabase, 3),
                (Act::KillBroker, 2),
                (Act::Cut(Cut::CommitNotForwarded), 4),
                (Act::Cut(Cut::CommitDelayed), 4),
                (Act::Cut(Cut::OutputsNotForwarded), 4),
            ]),
            _ => return None,
        })
    }
}
